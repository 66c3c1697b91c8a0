"""`python -m vllm_kvlink export COLLECTION DIRECTORY`: the directory that vLLM serves."""

from __future__ import annotations

import argparse
import sys

from kvlink_rag import KVLinkError, KVLinkRAG

from .export import export


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vllm_kvlink")
    commands = parser.add_subparsers(required=True)
    writes = commands.add_parser("export", help="write the directory that vLLM serves")
    writes.add_argument("collection", help="the collection's directory")
    writes.add_argument("directory", help="an empty or new one")
    writes.add_argument("--dtype", default="auto", help="what both are to compute in")
    given = parser.parse_args(arguments)
    try:
        with KVLinkRAG.open(given.collection, create=False, dtype=given.dtype) as rag:
            path = export(rag.model, given.directory)
            dtype = rag.model.backbone.dtype_name
    except KVLinkError as error:
        print(f"vllm_kvlink: error: {error}", file=sys.stderr)
        return 1
    print(f"{path} is written; vllm serve {path} --dtype {dtype}, and see the README")
    return 0


if __name__ == "__main__":
    sys.exit(main())
