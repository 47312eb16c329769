import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_aegis.data import FASTTokenizer
from hf_aegis.functional.normalization import DatasetStatistics, FeatureStatistics
from hf_aegis.models import PaliGemmaFlowForAction, PaliGemmaFlowProcessor


EXPERT = {
    "action_dim": 3,
    "state_dim": 4,
    "chunk_size": 5,
    "expert_hidden_size": 32,
    "expert_num_layers": 2,
    "expert_num_heads": 4,
    "expert_intermediate_size": 48,
}


def _vlm_processor() -> PaliGemmaProcessor:
    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "\n",
        "answer",
        "en",
        "what",
        "is",
        "left",
        "of",
        "the",
        "red",
        "blue",
        "pick",
        "up",
        "cup",
        "bowl",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    splits = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, fast)


@pytest.fixture(scope="session")
def vlm_processor() -> PaliGemmaProcessor:
    return _vlm_processor()


@pytest.fixture
def vlm_config(vlm_processor) -> PaliGemmaConfig:
    text = Gemma2Config(
        vocab_size=len(vlm_processor.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        # Larger than the default, so that a wrong mask or a lost token changes the outputs visibly.
        initializer_range=0.2,
    )
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    return PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=32,
        hidden_size=32,
        image_token_index=vlm_processor.image_token_id,
        vocab_size=len(vlm_processor.tokenizer),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


@pytest.fixture
def vlm(vlm_config) -> PaliGemmaForConditionalGeneration:
    torch.manual_seed(0)
    vlm_config._attn_implementation = "eager"
    return PaliGemmaForConditionalGeneration(vlm_config).eval()


@pytest.fixture
def vlm_folder(vlm, vlm_processor, tmp_path) -> str:
    vlm.save_pretrained(tmp_path / "vlm")
    vlm_processor.save_pretrained(tmp_path / "vlm")
    return str(tmp_path / "vlm")


@pytest.fixture
def expert() -> dict[str, int]:
    return dict(EXPERT)


@pytest.fixture
def model(vlm) -> PaliGemmaFlowForAction:
    torch.manual_seed(1)
    model = PaliGemmaFlowForAction.from_vlm(vlm, **EXPERT)
    # The expert starts at almost zero velocity; these tests want one that says something.
    torch.nn.init.normal_(model.action_expert.action_out_proj.weight, std=0.3)
    return model


@pytest.fixture
def statistics() -> DatasetStatistics:
    rng = np.random.default_rng(0)
    return DatasetStatistics(
        state=FeatureStatistics.from_samples("state", rng.normal(1.0, 2.0, (200, 4))),
        actions=FeatureStatistics.from_samples("actions", rng.uniform(-3.0, 5.0, (200, 3))),
    )


@pytest.fixture
def processor(vlm_processor, statistics) -> PaliGemmaFlowProcessor:
    return PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor, statistics)


@pytest.fixture
def action_tokenizer() -> FASTTokenizer:
    """Fitted to chunks of uniform noise, so that there are letters for any."""
    chunks = np.random.default_rng(3).uniform(-1, 1, (200, 5, 3))
    return FASTTokenizer.fit(list(chunks), vocab_size=100)


@pytest.fixture
def fast_processor(vlm_processor, statistics, action_tokenizer) -> PaliGemmaFlowProcessor:
    return PaliGemmaFlowProcessor.from_vlm_processor(vlm_processor, statistics, action_tokenizer=action_tokenizer)


@pytest.fixture
def fast_batch(fast_processor, images) -> dict[str, torch.Tensor]:
    """As `batch`, with the actions as FAST tokens behind each prompt."""
    rng = np.random.default_rng(2)
    return dict(
        fast_processor.prepare_action_inputs(
            images,
            ["pick up the red cup", "pick up the bowl left of the blue cup", "pick bowl"],
            state=rng.uniform(-1, 1, (3, 4)),
            actions=rng.uniform(-1, 1, (3, 5, 3)),
            action_tokens=True,
        )
    )


@pytest.fixture
def images() -> list[list[Image.Image]]:
    rng = np.random.default_rng(1)
    return [[Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(2)] for _ in range(3)]


@pytest.fixture
def batch(processor, images) -> dict[str, torch.Tensor]:
    """Three samples, two cameras each, prompts of different lengths, the last chunk padded from its third step."""
    rng = np.random.default_rng(2)
    is_pad = np.zeros((3, 5), dtype=bool)
    is_pad[2, 2:] = True
    return dict(
        processor.prepare_action_inputs(
            images,
            ["pick up the red cup", "pick up the bowl left of the blue cup", "pick bowl"],
            state=rng.uniform(-1, 1, (3, 4)),
            actions=rng.uniform(-1, 1, (3, 5, 3)),
            action_is_pad=is_pad,
        )
    )
