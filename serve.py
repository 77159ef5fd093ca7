"""Serves models on a web page and through an API like OpenAI's.

    python serve.py --out_dir=out-shakespeare
    python serve.py --out_dir=out-quickstart-base,out-quickstart      # side by side
    python serve.py --init_from=mine-hf,mine-int8/model.int8.onnx

Prints the address of the page. By default only this machine can open it; see --host.
"""
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import nanotune.threads  # noqa: F401

from configurator import AtLeast0, AtLeast1, Interval, configure
from nanotune.cli import run
from nanotune.device import DtypeName, pick_compile, pick_device, pick_dtype
from nanotune.errors import UserError
from nanotune.formats.checkpoint import pick_source
from nanotune.generation.fast import open_model
from nanotune.serving.access import Access, is_loopback
from nanotune.serving.api import Limits
from nanotune.serving.engine import Engine
from nanotune.serving.server import Server
from nanotune.text.read import read_text

SHORTEST_TOKEN = 16


@dataclass
class Config:
    # models
    out_dir: str = "out"       # read ckpt.pt of these runs, separated by commas
    init_from: str = "resume"  # resume: out_dir; else hub ids, folders, runs, .onnx files
    # address
    host: str = "127.0.0.1"    # 0.0.0.0: allow other machines; needs --token
    port: Annotated[int, Interval(0, 65536)] = 8000  # 0: any free port
    token: str = ""            # a secret that clients must send, or FILE:path to read it from
    allow_host: str = ""       # other names of this host, separated by commas; for a proxy
    # limits
    max_tokens: AtLeast1 = 2048  # maximum tokens per sample
    max_batch: AtLeast1 = 16   # maximum samples per request (prompts x n); limits memory
    max_queue: AtLeast0 = 16   # maximum requests that wait for a model
    # system
    device: str = "auto"       # auto, cpu, cuda, cuda:N, mps
    dtype: DtypeName = "auto"
    compile: bool | Literal["auto"] = False  # auto: on a GPU; takes a minute at the start


def read_token(cfg):
    """The text of --token. Raises UserError if it is invalid, or needed and missing."""
    token = cfg.token
    if token.startswith("FILE:"):
        token = read_text(token.removeprefix("FILE:")).strip()
    if not token and not is_loopback(cfg.host):
        raise UserError(f"--host={cfg.host} is open to other machines: give a --token that they "
                        "must send, such as the output of: python -c \"import secrets; "
                        "print(secrets.token_urlsafe())\"")
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()
                  or " " in token):
        raise UserError(f"--token needs at least {SHORTEST_TOKEN} ASCII characters, no spaces")
    return token


def name_sources(text: str) -> dict[str, str]:
    """{name: source} of comma-separated sources; a name is a path's last part, made unique."""
    named = {}
    for source in filter(None, map(str.strip, text.split(","))):
        name = last = Path(source).name or source
        number = 1
        while name in named:
            number += 1
            name = f"{last}-{number}"
        named[name] = source
    if not named:
        raise UserError("no model given: use --out_dir or --init_from")
    return named


def make_server(cfg: Config) -> Server:
    """Binds the address, then loads the models."""
    names = tuple(filter(None, cfg.allow_host.lower().split(",")))
    sources = name_sources(cfg.out_dir if cfg.init_from == "resume" else cfg.init_from)
    device = pick_device(cfg.device)
    dtype, compiled = pick_dtype(cfg.dtype, device), pick_compile(cfg.compile, device)
    server = Server((cfg.host, cfg.port), Access(cfg.host.lower(), read_token(cfg), names),
                    Limits(cfg.max_tokens, cfg.max_batch))
    for name, source in sources.items():
        if cfg.init_from == "resume":
            pick_source(source, "resume")  # an out_dir is never a hub id
        model = open_model(source, device, dtype, compiled)
        server.add(Engine(name, model, cfg.max_queue), source)
    return server


def main(argv: list[str]) -> None:
    cfg = configure(Config, argv)
    with make_server(cfg) as server, suppress(KeyboardInterrupt):
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        print(f"{', '.join(server.engines)}: http://{host}:{server.server_address[1]}/ "
              "(Ctrl-C stops the server)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run(main)
