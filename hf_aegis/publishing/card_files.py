"""Cards written into the folders that they are of."""

from pathlib import Path

from hf_aegis.atomic_files import write_text
from hf_aegis.publishing.adapter_card import ADAPTER_CONFIG, adapter_card
from hf_aegis.publishing.policy_card import CardOptions, policy_card
from hf_aegis.publishing.run_record import RunRecord


CARD_FILE = "README.md"


def write_card(
    folder: Path,
    repo_id: str | None = None,
    options: CardOptions | None = None,
    record: RunRecord | None = None,
) -> Path:
    """
    Writes the card of a policy or an adapter into its folder, and those of adapters in folders of it.

    Args:
        folder (`Path`): The output folder of a run, or an adapter's.
        repo_id (`str`, *optional*): Where it is on the Hub, or will be; by default the cards speak of the folder.
        options ([`CardOptions`], *optional*): What the card says besides.
        record ([`RunRecord`], *optional*): The run; by default it is read from the folder.

    Returns:
        `Path`: the card.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        card = adapter_card(folder, repo_id, options, record)
    else:
        record = record or RunRecord.read(folder)
        card = policy_card(record, repo_id, options)
        for config in sorted(folder.glob(f"*/{ADAPTER_CONFIG}")):
            if not config.parent.name.startswith(("checkpoint-", ".")):
                inside = adapter_card(config.parent, repo_id, options, record, config.parent.name)
                write_text(config.parent / CARD_FILE, inside)
    write_text(folder / CARD_FILE, card)
    return folder / CARD_FILE
