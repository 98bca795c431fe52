"""Questions of your own: read from disk, drawn by seed, made into batches for any model."""

from .collate import batches as batches, collate as collate, prompt as prompt
from .conversation import Conversation as Conversation, parse as parse
from .draw import Sample as Sample, draw as draw, reservoir as reservoir
from .lines import rows as rows
from .pictures import open_picture as open_picture, open_video as open_video
from .stills import load_processor as load_processor
