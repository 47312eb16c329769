"""
Cards of what a training leaves: policies and adapters. All that they say is read from the training's own files.

- `run_record`: what a run's folder tells of it.
- `methods`: how knowledge was kept, in words, from the run's arguments.
- `papers`: what a card cites.
- `policy_card`, `adapter_card`: the cards themselves, from the templates in `model_cards/`; `card_files` writes them.
"""

from hf_aegis.publishing.adapter_card import adapter_card
from hf_aegis.publishing.card_files import CARD_FILE, write_card
from hf_aegis.publishing.policy_card import CardOptions, policy_card
from hf_aegis.publishing.run_record import RunRecord


__all__ = ["CARD_FILE", "CardOptions", "RunRecord", "adapter_card", "policy_card", "write_card"]
