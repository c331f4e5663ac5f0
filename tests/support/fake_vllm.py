"""A small HTTP server that speaks as much of vLLM's dialect as training needs, and fails to order.

It really samples: token by token from plain forward passes of a small model, with adapters loaded
by PEFT from the folders it is told of. So what it answers is right unless a test makes it wrong.
"""

import copy
import json
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.support.tiny import tiny_llama, tiny_tokenizer

VOCABULARY = 300
SPECIAL = {"eos_token": "<eos>", "pad_token": "<pad>"}


def small_policy(seed=0, **settings):
    """The model that the fake server serves by default."""
    defaults = {"vocabulary": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1}
    return tiny_llama(seed=seed, **(defaults | settings))


def small_tokenizer():
    return tiny_tokenizer(VOCABULARY, **SPECIAL)


class Dropped(Exception):
    """The connection is to be cut."""


class FakeVLLM:
    """What the server has and how it is to fail.

    Attributes:
        requests: that came, (path, payload), in order.
        faults: path -> functions(handler), the next to be called instead of answering; one that
            returns False lets the answer follow.
        edit: changes an answer of /v1/completions before it is sent.
    """

    def __init__(self, *, model=None, tokenizer=None, max_length=256, max_rank=16, port=0):
        self.original = (small_policy() if model is None else model).eval()
        self.tokenizer = small_tokenizer() if tokenizer is None else tokenizer
        self.max_length = max_length
        self.max_rank = max_rank
        self.device = "cpu"
        self.raw_log_probs = False
        self.ignore_adapters = False
        self.started = 1000.0
        self.edit = lambda answer: answer
        self.faults = {}
        self.requests = []
        self.lock = threading.RLock()
        self.restart()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.handle(self, None)

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                fake.handle(self, json.loads(self.rfile.read(length)))

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    # ---- How it fails ----------------------------------------------------------------------------

    def fail(self, path, fault, times=1):
        self.faults.setdefault(path, deque()).extend([fault] * times)

    def restart(self):
        """As a new process would be: the weights it started with, no adapters."""
        with self.lock:
            self.started += 1
            self.base = copy.deepcopy(self.original)
            self.adapters = {}
            self.paused = False

    # ---- How it answers --------------------------------------------------------------------------

    def handle(self, handler, payload):
        path = handler.path.partition("?")[0]
        with self.lock:
            self.requests.append((path, payload))
            fault = self.faults[path].popleft() if self.faults.get(path) else None
        try:
            if fault is not None and fault(handler) is not False:
                return
            with self.lock:
                status, body = self.answer(path, payload)
        except Dropped:
            handler.close_connection = True
            return
        send(handler, status, body)

    def answer(self, path, payload):
        if path == "/health":
            return 200, ""
        if path == "/test/restart":
            self.restart()
            return 200, ""
        if path == "/metrics":
            return 200, f"# HELP x\nprocess_start_time_seconds {self.started}\nother 1\n"
        if path == "/server_info":
            return 200, {"vllm_config": {"device_config": {"device": self.device}}}
        if path == "/v1/models":
            base = {"id": "base", "root": "/models/base", "parent": None}
            adapters = [{"id": name, "root": "x", "parent": "base"} for name in self.adapters]
            return 200, {"data": [base | {"max_model_len": self.max_length}, *adapters]}
        if path == "/tokenize":
            ids = self.tokenizer(payload["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"tokens": ids}
        if path == "/v1/load_lora_adapter":
            return self.load(payload["lora_name"], Path(payload["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            if self.adapters.pop(payload["lora_name"], None) is None:
                return 404, error("The lora adapter cannot be found.")
            return 200, "Success"
        if path == "/pause":
            self.paused = True
            return 200, {"status": "paused"}
        if path == "/resume":
            self.paused = False
            return 200, {"status": "resumed"}
        if path == "/collective_rpc":
            assert self.paused and payload["method"] == "reload_weights"
            folder = Path(payload["kwargs"]["weights_path"])
            self.base = LlamaForCausalLM.from_pretrained(folder).eval()
            return 200, {"results": [None]}
        if path == "/v1/completions":
            return self.complete(payload)
        return 404, {"detail": "Not Found"}

    def load(self, name, folder):
        if name in self.adapters:
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").exists():
            return 404, error(f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return 500, error(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        assert load_file(folder / "adapter_model.safetensors")
        model = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
        self.adapters[name] = model
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def complete(self, payload):
        model = self.base if payload["model"] == "base" else self.adapters.get(payload["model"])
        if model is None:
            return 404, error(f"The model `{payload['model']}` does not exist.")
        if self.ignore_adapters:
            model = self.base
        if len(payload["prompt"]) + payload["max_tokens"] > self.max_length:
            return 400, error("This model's maximum context length is exceeded.")
        if "prompt_logprobs" in payload:
            return 200, {"choices": [self.scored(model, payload["prompt"])]}
        choices = [self.choice(model, payload, index) for index in range(payload["n"])]
        return 200, self.edit({"choices": choices})

    @torch.no_grad()
    def scored(self, model, tokens):
        """The log-probs of a prompt's tokens at temperature 1, as vLLM writes them."""
        log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        entries = [
            {str(token): {"logprob": log_probs[place, token].item(), "rank": 1}}
            for place, token in enumerate(tokens[1:])
        ]
        return {"index": 0, "prompt_logprobs": [None, *entries]}

    @torch.no_grad()
    def choice(self, model, payload, index):
        """One completion, by one plain forward pass a token."""
        generator = torch.Generator().manual_seed(payload["seed"] + index)
        tokens, log_probs, reason = [], [], "length"
        for _ in range(payload["max_tokens"]):
            logits = model(torch.tensor([payload["prompt"] + tokens])).logits[0, -1]
            scaled = (logits / payload["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
            tokens.append(token)
            scored = logits.log_softmax(-1) if self.raw_log_probs else scaled
            log_probs.append(scored[token].item())
            if token in payload["stop_token_ids"] and not payload["ignore_eos"]:
                reason = "stop"
                break
        return {
            "index": index,
            "text": "",
            "finish_reason": reason,
            "token_ids": tokens,
            "logprobs": {"token_logprobs": log_probs},
        }


def error(message):
    return {"error": {"message": message, "type": "BadRequestError", "code": 0}}


def send(handler, status, body):
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


# ---- Faults --------------------------------------------------------------------------------------


def status(code, message="out of order"):
    return lambda handler: send(handler, code, error(message))


def cut_off(handler):
    """Promise a long answer, send its beginning, cut the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    raise Dropped


def no_answer(handler):
    raise Dropped


def slow(seconds):
    def wait(handler):
        time.sleep(seconds)
        return False

    return wait


def body(text):
    return lambda handler: send(handler, 200, text)


@contextmanager
def serving(**settings):
    fake = FakeVLLM(**settings)
    try:
        yield fake
    finally:
        fake.close()
