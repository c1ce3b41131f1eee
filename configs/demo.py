"""The built-in world's CLP run: full-CLP between ROUGE and faithfulness.

  clp train --config configs/demo.py --workdir runs/mine

Finetunes a 0.2 million parameter T5 on the references first (DIR/sft), then
trains; about two minutes on two cores.
"""

from clp_jax.demo import get_config

__all__ = ["get_config"]
