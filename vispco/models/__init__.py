"""Model families: one small adapter file each."""

from . import gemma3 as gemma3
from . import idefics3 as idefics3
from . import internvl as internvl
from . import llava as llava
from . import llava_next as llava_next
from . import llava_onevision as llava_onevision
from . import paligemma as paligemma
from . import qwen2_5_vl as qwen2_5_vl
from . import qwen2_vl as qwen2_vl
from . import qwen3_vl as qwen3_vl
from .base import Adapter as Adapter
