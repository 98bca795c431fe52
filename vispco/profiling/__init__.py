"""What a model does with its image, layer by layer: `vispco.profile`, and the `Profile` it gives.

    g_k(n) = loss when everything is kept until layer k, and n visual tokens from there on

It tells in which layers the image is read, which layers rank its tokens badly, and from which
layer on it is dead weight. `vispco.search(start="profile")` plans schedules by it.
"""

from .measure import (
    has_films as has_films,
    measured as measured,
    named_methods as named_methods,
    profile as profile,
)
from .record import Profile as Profile, average as average, predicted as predicted
