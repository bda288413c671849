"""The papers behind each recipe, for model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """A method's paper; ``key`` is its BibTeX key."""

    key: str
    name: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def link(self) -> str:
        """Its title as a Markdown link."""
        return f"[{self.title}](https://arxiv.org/abs/{self.arxiv})"

    @property
    def bibtex(self) -> str:
        """Its BibTeX entry."""
        return (
            f"@article{{{self.key},\n    title = {{{{{self.title}}}}},\n"
            f"    author = {{{self.authors}}},\n    year = {{{self.year}}},\n"
            f"    eprint = {{arXiv:{self.arxiv}}}\n}}"
        )


GRPO = Paper(
    key="shao2024deepseekmath",
    name="GRPO",
    title=("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"),
    authors=(
        "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and "
        "Mingchuan Zhang and Y. K. Li and Y. Wu and Daya Guo"
    ),
    year=2024,
    arxiv="2402.03300",
)
DAPO = Paper(
    key="yu2025dapo",
    name="DAPO",
    title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    authors="Qiying Yu and Zheng Zhang and Ruofei Zhu and others",
    year=2025,
    arxiv="2503.14476",
)
DR_GRPO = Paper(
    key="liu2025understanding",
    name="Dr. GRPO",
    title="Understanding R1-Zero-Like Training: A Critical Perspective",
    authors=(
        "Zichen Liu and Changyu Chen and Wenjun Li and Penghui Qi and Tianyu Pang and Chao Du and "
        "Wee Sun Lee and Min Lin"
    ),
    year=2025,
    arxiv="2503.20783",
)
PAPERS: Mapping[str, tuple[Paper, ...]] = {
    "default": (GRPO, DAPO, DR_GRPO),
    "dapo": (GRPO, DAPO),
    "dr_grpo": (GRPO, DR_GRPO),
}


def papers_of(recipe: str) -> tuple[Paper, ...]:
    """The papers that a recipe comes from; GRPO's own is always the first."""
    return PAPERS.get(recipe, (GRPO,))
