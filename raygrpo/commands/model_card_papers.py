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
GSPO = Paper(
    key="zheng2025gspo",
    name="GSPO",
    title="Group Sequence Policy Optimization",
    authors="Chujie Zheng and Shixuan Liu and Mingze Li and Xiong-Hui Chen and Bowen Yu and others",
    year=2025,
    arxiv="2507.18071",
)
CISPO = Paper(
    key="minimax2025m1",
    name="CISPO",
    title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    authors="MiniMax",
    year=2025,
    arxiv="2506.13585",
)
SCALE_RL = Paper(
    key="khatri2025scalerl",
    name="ScaleRL",
    title="The Art of Scaling Reinforcement Learning Compute for LLMs",
    authors="Devvrit Khatri and Lovish Madaan and Rishabh Tiwari and others",
    year=2025,
    arxiv="2510.13786",
)
DPPO = Paper(
    key="qi2026stablerl",
    name="DPPO",
    title="Rethinking the Trust Region in LLM Reinforcement Learning",
    authors=(
        "Penghui Qi and Xiangxin Zhou and Zichen Liu and Tianyu Pang and Chao Du and Min Lin and "
        "Wee Sun Lee"
    ),
    year=2026,
    arxiv="2602.04879",
)
RLOO = Paper(
    key="ahmadian2024rloo",
    name="RLOO",
    title=(
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback "
        "in LLMs"
    ),
    authors=(
        "Arash Ahmadian and Chris Cremer and Matthias Gall\u00e9 and Marzieh Fadaee and "
        "Julia Kreutzer and Olivier Pietquin and Ahmet \u00dcst\u00fcn and Sara Hooker"
    ),
    year=2024,
    arxiv="2402.14740",
)
PAPERS: Mapping[str, tuple[Paper, ...]] = {
    "default": (GRPO, DAPO, DR_GRPO),
    "dapo": (GRPO, DAPO),
    "dr_grpo": (GRPO, DR_GRPO),
    "gspo": (GRPO, GSPO),
    "scalerl": (GRPO, SCALE_RL, CISPO),
    "dppo": (GRPO, DPPO),
    "rloo": (GRPO, RLOO),
}


def papers_of(recipe: str) -> tuple[Paper, ...]:
    """The papers that a recipe comes from; GRPO's own is always the first."""
    return PAPERS.get(recipe, (GRPO,))
