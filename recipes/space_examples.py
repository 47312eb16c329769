"""
Chooses the Space's example pictures from easy-VQA's test split: the first two questions of each type about pictures of
their own, in the order of a seed, so that nobody picked them for what the models answer.

    python recipes/space_examples.py --output_dir space/examples
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from hf_aegis.atomic_files import write_text
from hf_aegis.data.vqa import load_easy_vqa


SEED = 2
OF_EACH_TYPE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for pictures and examples.json")
    folder: Path = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    chosen: list[dict[str, str]] = []
    types: Counter[str] = Counter()
    pictures: set[int] = set()
    for sample in load_easy_vqa("test", seed=SEED):
        if types[sample.question_type] == OF_EACH_TYPE or id(sample.image) in pictures:
            continue
        types[sample.question_type] += 1
        pictures.add(id(sample.image))
        name = f"{len(chosen) + 1}.png"
        sample.image.save(folder / name, optimize=True)
        chosen.append({"image": name, "question": sample.question, "answer": sample.answer, "from": sample.name})
        if len(chosen) == 3 * OF_EACH_TYPE:
            break
    write_text(folder / "examples.json", json.dumps(chosen, indent=2) + "\n")


if __name__ == "__main__":
    main()
