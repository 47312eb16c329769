"""The papers that cards cite."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """One on arXiv, by its number there."""

    key: str
    arxiv: str
    year: int
    title: str
    authors: str

    @property
    def bibtex(self) -> str:
        """The entry of a bibliography."""
        return "\n".join(
            [
                f"@misc{{{self.key},",
                # Quoted: two braces would read as a template's.
                f'  title         = "{self.title}",',
                f"  author        = {{{self.authors}}},",
                f"  year          = {{{self.year}}},",
                f"  eprint        = {{{self.arxiv}}},",
                "  archivePrefix = {arXiv}",
                "}",
            ]
        )


_PAPERS = (
    Paper(
        "singh2026aegis",
        "2604.16067",
        2026,
        "{AEGIS}: Anchor-Enforced Gradient Isolation for Knowledge-Preserving Vision-Language-Action Fine-Tuning",
        "Guransh Singh",
    ),
    Paper(
        "beyer2024paligemma",
        "2407.07726",
        2024,
        "{PaliGemma}: A versatile {3B} {VLM} for transfer",
        "Beyer, Lucas and Steiner, Andreas and others",
    ),
    Paper(
        "steiner2024paligemma2",
        "2412.03555",
        2024,
        "{PaliGemma} 2: A Family of Versatile {VLMs} for Transfer",
        "Steiner, Andreas and others",
    ),
    Paper("lipman2022flow", "2210.02747", 2022, "Flow Matching for Generative Modeling", "Lipman, Yaron and others"),
    Paper(
        "black2024pi0",
        "2410.24164",
        2024,
        "$\\pi_0$: A Vision-Language-Action Flow Model for General Robot Control",
        "Black, Kevin and others",
    ),
    Paper(
        "hu2021lora",
        "2106.09685",
        2021,
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "Hu, Edward J. and others",
    ),
    Paper(
        "pertsch2025fast",
        "2501.09747",
        2025,
        "{FAST}: Efficient Action Tokenization for Vision-Language-Action Models",
        "Pertsch, Karl and others",
    ),
    Paper(
        "kirkpatrick2016ewc",
        "1612.00796",
        2016,
        "Overcoming catastrophic forgetting in neural networks",
        "Kirkpatrick, James and others",
    ),
    Paper(
        "li2018l2sp",
        "1802.01483",
        2018,
        "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        "Li, Xuhong and Grandvalet, Yves and Davoine, Franck",
    ),
    Paper("li2016lwf", "1606.09282", 2016, "Learning without Forgetting", "Li, Zhizhong and Hoiem, Derek"),
    Paper(
        "chaudhry2018agem",
        "1812.00420",
        2018,
        "Efficient Lifelong Learning with {A-GEM}",
        "Chaudhry, Arslan and others",
    ),
    Paper("yu2020pcgrad", "2001.06782", 2020, "Gradient Surgery for Multi-Task Learning", "Yu, Tianhe and others"),
    Paper(
        "chen2020graddrop",
        "2010.06808",
        2020,
        "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
        "Chen, Zhao and others",
    ),
    Paper(
        "wortsman2021wiseft",
        "2109.01903",
        2021,
        "Robust fine-tuning of zero-shot models",
        "Wortsman, Mitchell and others",
    ),
)
PAPERS = {paper.arxiv: paper for paper in _PAPERS}
"""By number on arXiv. A paper that is cited by its number alone, such as VLA-GSE's, is not among them."""


def bibliography(numbers: Iterable[str]) -> str:
    """The entries of papers by their numbers on arXiv, each once, in that order; unknown ones are left out."""
    return "\n\n".join(PAPERS[number].bibtex for number in dict.fromkeys(numbers) if number in PAPERS)


def arxiv_link(number: str) -> str:
    """A Markdown link to a paper."""
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"
