"""The HTTP client against a server that fails in every way we have seen or can think of."""

import json
import logging
import math
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("trl")

from hf_ebft.structured.vllm.client import Sampling, VLLMClient
from hf_ebft.structured.vllm.errors import (
    BadAnswer,
    ModelNotServed,
    RequestRefused,
    ServerUnavailable,
    VLLMServerError,
)
from hf_ebft.structured.vllm.settings import VLLMServerSettings
from tests.support import fake_vllm
from tests.support.fake_vllm import FakeVLLM, serving

SAMPLING = Sampling(max_tokens=5, temperature=0.7, stop_token_ids=(0,), seed=3)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def running():
    with serving() as fake:
        yield fake


@pytest.fixture
def fake(running):
    """The server of this file, as it starts."""
    running.restart()
    running.faults.clear()
    running.requests.clear()
    running.edit = lambda answer: answer
    return running


def client_of(fake, wait=0.0, **settings):
    """A client that does not wait between tries."""
    defaults = {
        "vllm_lora_sync": True,
        "vllm_server_base_url": fake.url,
        "vllm_request_timeout": 5.0,
        "vllm_request_retries": 2,
    }
    return VLLMClient(VLLMServerSettings(**(defaults | settings)), wait)


def asked(fake, path="/v1/completions"):
    return [found for found, _ in fake.requests].count(path)


def test_tokens_and_log_probs_are_the_models_at_the_temperature(fake):
    found = client_of(fake).complete("base", PROMPT, 3, SAMPLING)
    assert len(found) == 3
    assert len({tuple(completion.token_ids) for completion in found}) > 1
    for completion in found:
        ids = torch.tensor([PROMPT + completion.token_ids])
        with torch.no_grad():
            logits = fake.original(ids).logits[0, len(PROMPT) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected)


def test_nothing_of_the_sampling_is_left_to_the_servers_defaults(fake):
    client_of(fake).complete("base", PROMPT, 1, SAMPLING)
    payload = fake.requests[-1][1]
    assert payload["prompt"] == PROMPT  # tokens, not text
    assert payload["return_token_ids"] is True and payload["logprobs"] == 0
    plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert {name: payload[name] for name in plain} == plain


@pytest.mark.parametrize(
    "fault",
    [
        fake_vllm.status(500),
        fake_vllm.status(503),
        fake_vllm.status(429),
        fake_vllm.cut_off,
        fake_vllm.no_answer,
    ],
    ids=["500", "503", "429", "cut off", "no answer"],
)
def test_a_request_that_fails_is_sent_again_with_growing_waits(fake, fault, monkeypatch, caplog):
    untroubled = client_of(fake).complete("base", PROMPT, 2, SAMPLING)
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    client = client_of(fake, wait=1.0, vllm_request_retries=4)
    fake.fail("/v1/completions", fault, times=4)
    with caplog.at_level(logging.WARNING, logger="hf_ebft"):
        assert client.complete("base", PROMPT, 2, SAMPLING) == untroubled
    assert waits == [1.0, 2.0, 4.0]  # the second try comes at once
    assert client.retries_done == 4
    assert "was sent again 4 times" in caplog.text


@pytest.mark.parametrize(
    "fault",
    [fake_vllm.body('{"choices": [{"ind'), fake_vllm.body("<html>gateway</html>")],
    ids=["half a JSON", "no JSON"],
)
def test_an_answer_that_is_no_json_comes_from_a_server_that_is_gone(fake, fault):
    fake.fail("/v1/completions", fault)
    with pytest.raises(ServerUnavailable, match="an answer that is not valid JSON"):
        client_of(fake).complete("base", PROMPT, 2, SAMPLING)


def test_a_server_that_refuses_connections_is_not_tried_again(monkeypatch):
    """Whoever asks for a whole batch waits for the server once, not once for each request."""
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    settings = VLLMServerSettings(
        vllm_lora_sync=True, vllm_server_base_url=f"http://127.0.0.1:{free_port()}"
    )
    with pytest.raises(ServerUnavailable, match="refused"):
        VLLMClient(settings).complete("base", PROMPT, 1, SAMPLING)
    assert waits == []


def test_retries_are_bounded_and_the_last_cause_is_told(fake):
    fake.fail("/v1/completions", fake_vllm.status(500, "CUDA out of memory"), times=3)
    with pytest.raises(ServerUnavailable, match=r"3 times in a row.*CUDA out of memory"):
        client_of(fake).complete("base", PROMPT, 1, SAMPLING)
    assert asked(fake) == 3


def test_a_slow_answer_counts_as_failed_and_is_asked_for_again(fake):
    fake.fail("/v1/completions", fake_vllm.slow(1.0))
    client = client_of(fake, vllm_request_timeout=0.3)
    assert len(client.complete("base", PROMPT, 1, SAMPLING)) == 1
    assert client.retries_done == 1


def test_a_refusal_is_not_repeated_and_shows_the_servers_words(fake):
    with pytest.raises(RequestRefused, match="maximum context length"):
        client_of(fake).complete("base", [5] * 300, 1, SAMPLING)
    assert asked(fake) == 1


def test_an_unknown_adapter_is_told_apart(fake):
    with pytest.raises(ModelNotServed, match="`gone` does not exist"):
        client_of(fake).complete("gone", PROMPT, 1, SAMPLING)


def drop_a_choice(answer):
    return {"choices": answer["choices"][:-1]}


def edit_choice(**changes):
    def edit(answer):
        return {"choices": [choice | changes for choice in answer["choices"]]}

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_a_choice, "asked for 2 completions and sent 1"),
        (lambda answer: {"choices": None}, "asked for 2 completions and sent none"),
        (edit_choice(token_ids=None), "without token ids"),
        (edit_choice(logprobs=None), "with no log-probs"),
        (edit_choice(logprobs={"token_logprobs": [-1.0]}, token_ids=[4, 5]), "2 tokens with 1 log"),
        (edit_choice(logprobs={"token_logprobs": [None]}, token_ids=[4]), "log-prob None"),
        (edit_choice(logprobs={"token_logprobs": [math.nan]}, token_ids=[4]), "log-prob nan"),
        (edit_choice(logprobs={"token_logprobs": [-9999.0]}, token_ids=[4]), "log-prob -9999"),
        (edit_choice(logprobs={"token_logprobs": [0.5]}, token_ids=[4]), "log-prob 0.5"),
        (edit_choice(logprobs={"token_logprobs": []}, token_ids=[]), "without any token"),
    ],
)
def test_an_answer_that_lacks_something_stops_the_run_and_says_what(fake, edit, message):
    fake.edit = edit
    with pytest.raises(BadAnswer, match=message):
        client_of(fake).complete("base", PROMPT, 2, SAMPLING)


def test_a_completion_that_was_broken_off_comes_from_a_server_that_is_gone(fake):
    fake.edit = edit_choice(finish_reason="abort")
    with pytest.raises(ServerUnavailable, match=r"aborted .finish_reason 'abort'"):
        client_of(fake).complete("base", PROMPT, 1, SAMPLING)


def test_completions_come_in_the_order_of_their_numbers(fake):
    straight = client_of(fake).complete("base", PROMPT, 3, SAMPLING)
    fake.edit = lambda answer: {"choices": answer["choices"][::-1]}
    assert client_of(fake).complete("base", PROMPT, 3, SAMPLING) == straight


def test_scores_of_a_text_are_the_models(fake):
    tokens = [5, 6, 7, 8, 9]
    with torch.no_grad():
        log_probs = fake.original(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [log_probs[place, token].item() for place, token in enumerate(tokens[1:])]
    assert client_of(fake).score("base", tokens) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ModelNotServed):
        client_of(fake).score("gone", tokens)
    fake.fail("/v1/completions", fake_vllm.body('{"choices": [{"prompt_logprobs": [null]}]}'))
    with pytest.raises(BadAnswer, match="asked for the log-probs of a prompt"):
        client_of(fake).score("base", tokens)


# ---- Waiting for the server ----------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_comes_up_later_is_waited_for(caplog, monkeypatch):
    monkeypatch.setattr("hf_ebft.structured.vllm.client.PROGRESS_EVERY", 0.05)
    port = free_port()
    started = []
    timer = threading.Timer(0.4, lambda: started.append(FakeVLLM(port=port)))
    timer.start()
    settings = VLLMServerSettings(
        vllm_lora_sync=True, vllm_server_host="127.0.0.1", vllm_server_port=port
    )
    client = VLLMClient(settings, wait=0.05)
    with caplog.at_level(logging.WARNING):
        client.wait_until_ready()
    assert started
    started[0].close()
    assert "waiting for the vLLM server" in caplog.text and "refused" in caplog.text


def test_a_server_that_never_comes_up_is_a_clear_error():
    settings = VLLMServerSettings(
        vllm_lora_sync=True,
        vllm_server_base_url=f"http://127.0.0.1:{free_port()}/",
        vllm_server_timeout=0.2,
    )
    client = VLLMClient(settings, wait=0.05)
    with pytest.raises(VLLMServerError, match=r"no vLLM server is up .*`hf-ebft serve --config"):
        client.wait_until_ready()


def test_an_unhealthy_server_is_waited_for_too(fake):
    fake.fail("/health", fake_vllm.status(503), times=3)
    client_of(fake).wait_until_ready()
    assert asked(fake, "/health") == 4


# ---- What the server is --------------------------------------------------------------------------


def test_base_model_is_found_beside_adapters(fake):
    fake.adapters["a"] = None
    served = client_of(fake).base_model()
    assert (served.name, served.path, served.max_length) == ("base", "/models/base", 256)


def test_a_base_model_of_another_name_is_refused(fake):
    with pytest.raises(VLLMServerError, match="serves base, not vllm_served_model_name='llama'"):
        client_of(fake, vllm_served_model_name="llama").base_model()


def test_something_else_than_vllm_is_recognised(fake):
    fake.fail("/v1/models", fake_vllm.body('{"hello": "world"}'))
    with pytest.raises(BadAnswer, match="no vLLM server"):
        client_of(fake).base_model()


def test_start_time_tells_a_restart(fake):
    client = client_of(fake)
    before = client.start_time()
    assert client.start_time() == before
    fake.restart()
    assert client.start_time() != before


def test_start_time_is_unknown_without_metrics(fake):
    fake.fail("/metrics", fake_vllm.status(404))
    assert client_of(fake).start_time() is None


# ---- Adapters ------------------------------------------------------------------------------------


def test_a_refused_adapter_shows_the_servers_words_and_is_sent_once(fake, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64}))
    with pytest.raises(RequestRefused, match="LoRA rank 64 is greater than max_lora_rank 16"):
        client_of(fake).load_adapter("a", str(tmp_path))
    assert asked(fake, "/v1/load_lora_adapter") == 1


def test_a_folder_that_the_server_does_not_see_names_the_setting(fake):
    with pytest.raises(VLLMServerError, match="vllm_sync_dir_on_server"):
        client_of(fake).load_adapter("a", "/nowhere")


def test_a_server_without_runtime_loading_says_how_to_start_it(fake):
    fake.fail("/v1/load_lora_adapter", fake_vllm.status(404, "Not Found"))
    with pytest.raises(VLLMServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        client_of(fake).load_adapter("a", "/nowhere")


def test_a_lost_answer_to_loading_an_adapter_is_no_failure(fake):
    def loads_and_loses_the_answer(handler):
        fake.adapters["a"] = fake.base
        raise fake_vllm.Dropped

    fake.fail("/v1/load_lora_adapter", loads_and_loses_the_answer)
    client = client_of(fake)
    client.load_adapter("a", "/x")
    # The second try was refused: the adapter has been loaded already.
    assert asked(fake, "/v1/load_lora_adapter") == 2 and client.retries_done == 1
    assert list(fake.adapters) == ["a"]


def test_unloading_what_is_not_there_is_fine(fake):
    fake.adapters["b"] = fake.base
    client_of(fake).unload_adapter("a")
    assert list(fake.adapters) == ["b"]
    client_of(fake).unload_adapter("b")
    assert fake.adapters == {}


def test_a_frozen_server_is_not_waited_for_at_the_end(fake, monkeypatch):
    monkeypatch.setattr("hf_ebft.structured.vllm.client.CLEANUP_TIMEOUT", 0.2)
    fake.fail("/v1/unload_lora_adapter", fake_vllm.slow(1.0), times=3)
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="unload the adapter a"):
        client_of(fake).unload_adapter("a", at_the_end=True)
    assert time.monotonic() - started < 0.9
    fake.faults.clear()


def test_full_weights_need_development_mode(fake):
    fake.fail("/pause", fake_vllm.status(404, "Not Found"))
    with pytest.raises(VLLMServerError, match="VLLM_SERVER_DEV_MODE=1"):
        client_of(fake).reload_weights("/x")


def test_a_server_is_resumed_even_if_reloading_failed(fake):
    fake.fail("/collective_rpc", fake_vllm.status(500, "no such file"))
    with pytest.raises(VLLMServerError, match="no such file"):
        client_of(fake).reload_weights("/x")
    assert not fake.paused


def test_control_c_during_a_reload_waits_for_no_frozen_server(fake, monkeypatch):
    monkeypatch.setattr("hf_ebft.structured.vllm.client.CLEANUP_TIMEOUT", 0.2)
    client = client_of(fake)
    send = client._transport.send

    def interrupted(method, path, *args, **options):
        if path == "/collective_rpc":
            raise KeyboardInterrupt
        return send(method, path, *args, **options)

    monkeypatch.setattr(client._transport, "send", interrupted)
    fake.fail("/resume", fake_vllm.slow(2.0), times=9)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.reload_weights("/x")
    assert time.monotonic() - started < 1.5
    fake.faults.clear()


def test_an_api_key_is_sent(fake, monkeypatch):
    seen = []
    fake.fail("/health", lambda handler: seen.append(handler.headers["Authorization"]) or False)
    monkeypatch.setenv("VLLM_API_KEY", "token")
    client_of(fake).wait_until_ready()
    assert seen == ["Bearer token"]
