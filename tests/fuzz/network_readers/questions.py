"""Questions and instructions, as far as the tokens that a model gets."""

from random import Random

from PIL import Image
from transformers import AutoProcessor

import hf_aegis.models  # noqa: F401 (registers the processor)
from hf_aegis.assets import ACTING_POLICY
from hf_aegis.data.vqa import VQACollator, VQASample
from hf_aegis.serving.clients import ObservationReader
from network_readers.case import Case


def questions() -> Case:
    processor = AutoProcessor.from_pretrained(ACTING_POLICY)
    collator, picture = VQACollator(processor), Image.new("RGB", (8, 8))
    cameras = processor.cameras
    server = ObservationReader("native", (), ())
    tokens = processor.image_seq_length
    # What nothing is known of is `<unk>`.
    special = {*processor.tokenizer.all_special_ids} - {processor.tokenizer.unk_token_id, processor.image_token_id}

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "surrogatepass")
        inputs = collator.prompts([VQASample(picture, text, "")])["input_ids"][0].tolist()
        _check_ids(inputs, tokens)
        ids = processor.prepare_action_inputs([[picture] * len(cameras)], [text])["input_ids"][0].tolist()
        _check_ids(ids, tokens * len(cameras))
        server.read({"prompt": text})

    def _check_ids(ids: list[int], images: int) -> None:
        assert ids.count(processor.image_token_id) == images, "a picture more or less than there are"
        assert sum(index in special for index in ids) == 1, "a token of the model's own besides the first"
        assert len(ids) < images + 4100

    def reading(data: bytes) -> None:
        try:
            read(data)
        except UnicodeDecodeError as error:
            raise ValueError("no text") from error

    seeds = ["what color is the shape?", "pick up the milk and place it in the basket", "नमस्ते 👩‍🔬?", "é" * 30]
    return Case(reading, [seed.encode() for seed in seeds], (ValueError,), (_mutate_text,) * 2)


_INSERTED = (
    *("<image>", "<eos>", "<bos>", "<pad>", "<loc0001>", "<seg127>", "<unk>", "<mask>", "<", ">", "<image", "image>"),
    *("\0", "\x1b[2J", "\u200b", "\u200d", "\u202e", "\u2066", "\ufeff", "\ufffd", "\ud800", "\udfff", "\U000e0001"),
    *("\u0301" * 50, "a" * 2000, "\n" * 50, "{question}", "{0}", "%s", "\U0010ffff", "﷽", "ｆｕｌｌ", "＜image＞"),
)


def _mutate_text(data: bytes, random: Random) -> bytes:
    text = data.decode("utf-8", "ignore")
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(text) + 1)
        kind = random.randrange(4)
        if kind <= 1:
            text = text[:place] + random.choice(_INSERTED) + text[place:]
        elif kind == 2:
            text = text[:place] + text[place + random.choice((1, 3, 100)) :]
        else:
            text = (
                text[:place] + chr(random.choice((random.randrange(0x300), random.randrange(0x110000)))) + text[place:]
            )
    return text.encode("utf-8", "surrogatepass")
