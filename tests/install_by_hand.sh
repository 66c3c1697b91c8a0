#!/bin/sh
# The four distributions as people get them: built (sdist, and the wheel from it), checked, and
# installed into a new environment as the READMEs say. Run by `make dist`.
# What they depend on is not installed once more: pip says which it would take, as far as
# constraints.txt lets it, and the new environment then sees those of .venv.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
venv=${VENV:-.venv}
python=$venv/bin/python
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

say() { printf '\n== %s\n' "$1"; }
site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

say "build and check"
rm -rf dist
"$python" -m venv "$new/tools"
"$new/tools/bin/python" -m pip install --quiet --constraint constraints.txt build twine
for folder in . integrations/langchain integrations/llama_index integrations/vllm; do
	"$new/tools/bin/python" -m build --outdir dist "$folder" >"$new/build.log" 2>&1 ||
		{ cat "$new/build.log"; exit 1; }
done
"$new/tools/bin/python" -m twine check --strict dist/*
ls dist/*.whl | wc -l | grep -qx ' *4' || { echo "expected four wheels"; exit 1; }

say "the READMEs' line, as far as pip's choice of versions"
"$python" -m venv "$new/fresh"
fresh=$new/fresh/bin
"$fresh/python" -m pip install --quiet --dry-run --constraint constraints.txt \
	. ./integrations/langchain ./integrations/llama_index ./integrations/vllm

say "install the wheels"
"$fresh/python" -m pip install --quiet --no-deps --no-index dist/*.whl
site "$python" >"$(site "$fresh/python")/dependencies.pth"

say "try them"
mkdir "$new/away"
cd "$new/away"
export HF_HUB_OFFLINE=1
unset PYTHONPATH
"$fresh/kvlink-rag" --version
"$fresh/python" - "$new" <<'PYTHON'
import sys

import kvlink_rag
import langchain_kvlink
import llama_index.embeddings.contriever
import llama_index.llms.kvlink
import llama_index.response_synthesizers.kvlink
import llama_index.retrievers.kvlink
import vllm_kvlink

for module in (kvlink_rag, langchain_kvlink, llama_index.llms.kvlink, vllm_kvlink):
    assert module.__file__.startswith(sys.argv[1]), f"{module.__file__} is not the wheel's"
PYTHON
echo "The harbour of Orvale was built in 1911." >orvale.txt
"$fresh/kvlink-rag" --dir "$new/collection" index orvale.txt
"$fresh/kvlink-rag" --dir "$new/collection" ask "When was the harbour of Orvale built?" |
	tee answer.txt
grep -q orvale.txt answer.txt || { echo "expected the source"; exit 1; }
"$fresh/kvlink-rag" bench
say "all four work from their wheels, which are in $root/dist"
