"""The tests of the vLLM engine need vLLM: `scripts/test --vllm` runs them where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
