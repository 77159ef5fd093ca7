"""The programs that bench.py compares nanotune with, each at its best setting.

    python experiments/rivals.py TASK JSON    # prints the figures as one line of JSON

bench.py runs each task in a separate process. TASKS, at the end of the file, lists them.
"""
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


def gpu_memory(device):
    return {"memory": torch.cuda.max_memory_allocated()} if device == "cuda" else {}


# -----------------------------------------------------------------------------
# transformers and nanoGPT

def train_transformers(folder, batch_size, block_size, steps, warm_up, device, dtype, compiled):
    """Measures transformers' GPT2LMHeadModel in a plain training loop: sdpa, fused AdamW."""
    from transformers import GPT2LMHeadModel
    torch.set_float32_matmul_precision("high")  # TF32, as train.py
    model = GPT2LMHeadModel.from_pretrained(
        Path(folder, "hf"), dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = np.fromfile(Path(folder, "data", "train.bin"), "<u2").astype(np.int64)
    rng, times = np.random.RandomState(1), []
    for _ in range(warm_up + steps):
        began = time.perf_counter()
        starts = rng.randint(0, len(tokens) - block_size, batch_size)
        x = torch.from_numpy(np.stack([tokens[s:s + block_size] for s in starts])).to(device)
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the GPU
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[warm_up:])
    return {"tok/s": batch_size * block_size / seconds} | gpu_memory(device)


def sample_transformers(folder, num_samples, max_new_tokens, device, dtype, compiled):
    """Measures transformers' generate() with its cache. `compiled` uses the static cache, for which
    generate() compiles the model itself."""
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(
        Path(folder, "hf"), dtype=getattr(torch, dtype)).to(device).eval()
    idx = torch.ones(num_samples, 1, dtype=torch.long, device=device)
    options = dict(attention_mask=torch.ones_like(idx), do_sample=True, temperature=0.8, top_k=200,
                   pad_token_id=model.config.vocab_size - 1)
    if compiled:
        options["cache_implementation"] = "static"
    timed = []  # with a static cache, each new length compiles again: warm up with the same one
    for n in (max_new_tokens,) * 3 if compiled else (8, 8, max_new_tokens):
        began = time.perf_counter()
        new = model.generate(idx, max_new_tokens=n, min_new_tokens=n, **options)
        int(new[0, -1])  # waits for the GPU
        timed.append(time.perf_counter() - began)
    return {"tok/s": num_samples * max_new_tokens / timed[-1]} | gpu_memory(device)


def sample_nanogpt(path, shape, num_samples, max_new_tokens, device, dtype):
    """Measures nanoGPT's model.generate() under autocast, as in its sample.py."""
    sys.path.insert(0, path)  # nanoGPT's model.py, not ours
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**shape)).to(device).eval()
    idx = torch.ones(num_samples, 1, dtype=torch.long, device=device)
    with torch.no_grad(), torch.autocast(device, getattr(torch, dtype),
                                         enabled=dtype != "float32"):
        gpt.generate(idx, 4, temperature=0.8, top_k=200)
        began = time.perf_counter()
        int(gpt.generate(idx, max_new_tokens, temperature=0.8, top_k=200)[0, -1])
        seconds = time.perf_counter() - began
    return {"tok/s": num_samples * max_new_tokens / seconds} | gpu_memory(device)


# -----------------------------------------------------------------------------
# llama.cpp

# our names of GPT-2's modules -> names in GGUF files
GGUF_NAMES = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd",
              "transformer.ln_f": "output_norm", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv",
              "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
              "mlp.c_proj": "ffn_down"}


def write_gguf(model, path):
    """Writes a GPT-2 as a GGUF file in float32. llama-bench does not need the vocabulary."""
    import gguf
    config, file = model.config, gguf.GGUFWriter(path, "gpt2")
    file.add_block_count(config.n_layer)
    file.add_context_length(config.block_size)
    file.add_embedding_length(config.n_embd)
    file.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    file.add_head_count(config.n_head)
    file.add_layer_norm_eps(config.norm_eps)
    file.add_tokenizer_model("none")
    file.add_vocab_size(config.vocab_size)
    for name, param in model.named_parameters():
        module, part = name.rsplit(".", 1)
        layer = re.match(r"transformer\.h\.(\d+)\.(.*)", module)
        found = f"blk.{layer[1]}.{GGUF_NAMES[layer[2]]}" if layer else GGUF_NAMES[module]
        file.add_tensor(f"{found}.{part}", param.detach().float().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def sample_llama_cpp(source, folder, executable, form, max_new_tokens):
    """Runs llama-bench on a GGUF file of the model, which llama-quantize converts to `form`. Both
    programs must be in the same folder."""
    sys.path.insert(0, str(ROOT))
    from nanotune.formats.checkpoint import load_model
    whole, path = Path(folder, "f32.gguf"), Path(folder, f"{form}.gguf")
    if not whole.exists():
        write_gguf(load_model(source)[0], whole)
    if not path.exists():
        quantize = Path(executable).with_name("llama-quantize")
        subprocess.run([quantize, whole, path, form], check=True, capture_output=True)
    done = subprocess.run([executable, "-m", path, "-t", str(torch.get_num_threads()), "-p", "0",
                           "-n", str(max_new_tokens), "-r", "1", "-o", "json"],
                          check=True, capture_output=True, text=True)
    return {"tok/s": json.loads(done.stdout)[0]["avg_ts"], "size": path.stat().st_size}


# -----------------------------------------------------------------------------
# CTranslate2

def sample_ctranslate2(source, folder, form, num_samples, max_new_tokens):
    """Measures CTranslate2's Generator on a converted Hugging Face folder."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    path = Path(folder, f"ctranslate2-{form}")
    if not path.exists():
        TransformersConverter(source).convert(str(path), quantization=form)
    generator = ctranslate2.Generator(str(path), intra_threads=torch.get_num_threads())
    words = json.loads(Path(path, "vocabulary.json").read_text(encoding="utf-8"))
    for n in (8, max_new_tokens):
        began = time.perf_counter()
        generator.generate_batch([[words[1]]] * num_samples, max_length=n, min_length=n,
                                 sampling_topk=200, sampling_temperature=0.8)
        seconds = time.perf_counter() - began
    return {"tok/s": num_samples * max_new_tokens / seconds,
            "size": Path(path, "model.bin").stat().st_size}


TASKS = {f.__name__: f for f in (train_transformers, sample_transformers, sample_nanogpt,
                                 sample_llama_cpp, sample_ctranslate2)}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
