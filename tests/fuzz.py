"""A coverage-guided fuzzer (atheris) on every place where bytes from outside come in.

    pip install 'kvlink-rag[fuzz]'
    python tests/fuzz.py snapshot_bytes -max_total_time=60
    python tests/fuzz.py all -max_total_time=60        # each target in turn

Further arguments are libFuzzer's. What must hold stands in `targets.py`; an input that breaks it is
written to `crash-<digest>` and the exit status is not 0.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target; does not return."""
    import atheris

    with atheris.instrument_imports(include=["kvlink_rag"]):
        import targets

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(targets.seeds(name)):
            Path(corpus, f"seed{number}").write_bytes(seed)
        options = ["-timeout=20", "-max_len=20000", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, *arguments, corpus], targets.TARGETS[name])
        atheris.Fuzz()


def main() -> int:
    name, arguments = sys.argv[1], sys.argv[2:]
    if name != "all":
        fuzz(name, arguments)
    import targets

    runs = [
        subprocess.run([sys.executable, __file__, target, *arguments], check=False).returncode
        for target in targets.TARGETS
    ]
    return max(runs)


if __name__ == "__main__":
    sys.exit(main())
