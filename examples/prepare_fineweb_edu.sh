#!/usr/bin/env bash
# Prepare FineWeb-Edu on a SLURM cluster, or here: examples/prepare_fineweb_edu.sh <corpus folder> [key=value …]
#
# Without parquet files in the folder, it downloads sample/10BT first (14 files, 27 GB; ODC-By 1.0), and says so.
# Every file becomes a task. With EXECUTOR=local the tasks run on this machine, as many at a time as it has cores.
# The key=value settings are those of prepare.py: tokenizer=bpe tokenizer.vocab_size=32768, curation=deduplication …
#
#     PARTITION=cpu examples/prepare_fineweb_edu.sh /shared/fineweb-edu data.shards_dir=/shared/shards
#     python train.py data=text data.path=/shared/fineweb-edu data.shards_dir=/shared/shards    # when the jobs are done
set -euo pipefail
corpus=${1:?a folder for the corpus, which all machines see}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$corpus"

if [ -e "$corpus/.downloading" ] || [ -z "$(find "$corpus" -name '*.parquet' -print -quit)" ]; then
    touch "$corpus/.downloading"  # all of it, after Ctrl-C too
    echo "Not all parquet files are in $corpus: downloading 27 GB from huggingface.co (Ctrl-C ends it)"
    "$(dirname "$("$python" -c 'import sys; print(sys.executable)')")/hf" download HuggingFaceFW/fineweb-edu \
        --repo-type dataset --include 'sample/10BT/*' --local-dir "$corpus"
    rm "$corpus/.downloading"
fi
tasks=$(find "$corpus" -name '*.parquet' | wc -l)
executor=${EXECUTOR:-slurm}
arguments=null
if [ "$executor" = slurm ]; then
    arguments="{partition: ${PARTITION:?the partition of the cluster}, time: '${TIME:-12:00:00}', mem_per_cpu_gb: ${MEM_GB:-4}}"
fi
exec "$python" "$root/prepare.py" data=text "data.path='$corpus'" \
    engine=datatrove engine.executor="$executor" engine.tasks="$tasks" "engine.arguments=$arguments" "$@"
