"""`vispco.apply`: one pruner, and two ways to leave a token out.

deploy (`Dropping`): dropped tokens leave the hidden states, the rotary embeddings, the masks and
    the KV cache.
search (`Masking`): tokens stay, masked keys are renormalised away, and gradients reach the keep
    ratios.
"""

from .apply import apply as apply, check_fits as check_fits, unwrapped as unwrapped
from .dropping import Dropping as Dropping
from .masking import Masking as Masking
from .pruner import Pruner as Pruner
