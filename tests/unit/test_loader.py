from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmserve.cli.main import app
from llmserve.errors import ConfigError
from llmserve.registry.engine_args import ENGINE_ARGS
from llmserve.registry.loader import load
from llmserve.registry.spec import Config, ModelSpec, ServerSpec

SAMPLE = Path(__file__).parents[2] / "models.yaml"


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder with a model folder `m` in it."""
    (tmp_path / "m").mkdir()
    return tmp_path


def read(folder: Path, text: str) -> Config:
    file = folder / "models.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read(folder, text)
    return [problem.removeprefix("models.yaml:") for problem in refused.value.problems]


def chat(folder: Path, entry: str, before: str = "") -> ModelSpec:
    """The model of a registry whose entry, in flow style, has this besides its folder."""
    (spec,) = read(folder, f"{before}\nmodels: {{chat: {{model: m, {entry}}}}}\n").models
    return spec


def chat_problems(folder: Path, entry: str) -> list[str]:
    return problems(folder, f"models: {{chat: {{model: m, {entry}}}}}\n")


def test_the_sample_loads(tmp_path: Path) -> None:
    shutil.copy(SAMPLE, tmp_path)
    for name in ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"):
        (tmp_path / "models" / name).mkdir(parents=True)
    config = load(tmp_path / "models.yaml")
    assert [spec.name for spec in config.models] == ["chat", "embed"]
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8000)
    assert config.models[0].aliases == ("gpt-4o-mini",)
    assert config.models[0].kv_cache == 2**30
    assert config.models[0].sampling.max_tokens == 256  # without it an answer can take minutes
    assert config.models[0].model == str(tmp_path / "models" / "SmolLM2-135M-Instruct")


def test_the_shortest_registry_has_every_default(box: Path) -> None:
    config = read(box, "models: {chat: {model: m}}\n")
    assert config.server == ServerSpec()
    assert config.models == (ModelSpec(name="chat", model=str(box / "m")),)


# --- mistakes

WRONG = """\
sever: {port: 1}
server:
  prot: 8000
  port: 70000
  api_keys: [""]
  ssl_keyfile: none.pem
defaults:
  max_in_flight: none
  model: m
models:
  chat:
    model: ./nowhere
    tensor_paralel_size: 2
    engine: {max_model_lenn: 2048, dtype: float17}
  embed:
    model: m
    devices: [0, 0]
    limit-worker-concurrency: 5
    aliases: [chat]
  rerank:
    model: m
    gpu_memory_utilization: 1.5
    chat_template: missing.jinja
    tool_call_parser: hermess
    memory: lots
  embed: {model: m}
  speech: {aliases: [" whisper"], max_in_flight: 1}
  vision: 7
"""


def test_every_problem_is_reported_in_one_run_with_its_line(box: Path) -> None:
    file = box / "models.yaml"
    file.write_text(WRONG, encoding="utf-8")
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert result.stdout == ""
    dtypes = "'auto', 'half', 'float16', 'bfloat16', 'float' or 'float32'"
    assert result.stderr.splitlines() == [
        "models.yaml:1: sever: unknown key; nearest: server",
        "models.yaml:3: server.prot: unknown key; nearest: port",
        "models.yaml:4: server.port: must be less than or equal to 65535; got 70000",
        "models.yaml:5: server.api_keys.0: is empty; a key needs at least one character",
        f"models.yaml:6: server.ssl_keyfile: no such file: {box / 'none.pem'}",
        "models.yaml:8: defaults.max_in_flight: must be an integer; got 'none'",
        "models.yaml:9: defaults.model: unknown key; it is a key of a model",
        f"models.yaml:12: models.chat.model: no such folder: {box / 'nowhere'}",
        (
            "models.yaml:13: models.chat.tensor_paralel_size: unknown key; "
            "nearest: tensor_parallel_size"
        ),
        f"models.yaml:14: models.chat.engine.dtype: must be {dtypes}; got 'float17'",
        "models.yaml:14: models.chat.engine.max_model_lenn: unknown key; nearest: max_model_len",
        "models.yaml:17: models.embed.devices: lists a GPU twice",
        (
            "models.yaml:18: models.embed.limit-worker-concurrency: unknown key; "
            "FastChat's limit-worker-concurrency is `max_in_flight` here"
        ),
        "models.yaml:19: models.embed.aliases.0: the name chat is already used by models.chat",
        (
            "models.yaml:22: models.rerank.gpu_memory_utilization: "
            "must be less than or equal to 1; got 1.5"
        ),
        f"models.yaml:23: models.rerank.chat_template: no such file: {box / 'missing.jinja'}",
        "models.yaml:24: models.rerank.tool_call_parser: unknown parser hermess; nearest: hermes",
        ("models.yaml:25: models.rerank.memory: must be a size such as 12GiB or 500MB; got 'lots'"),
        "models.yaml:26: models.embed: duplicate key; first on line 15",
        (
            "models.yaml:27: models.speech.aliases.0: invalid name; must be 1 to 128 printable "
            "characters without surrounding blanks"
        ),
        "models.yaml:27: models.speech.model: is missing",
        "models.yaml:28: models.vision: is a number; must be a mapping of keys to values",
    ]


def test_problems_are_in_the_order_of_the_file(box: Path) -> None:
    lines = [int(problem.partition(":")[0]) for problem in problems(box, WRONG)]
    assert len(lines) >= 20
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "models.yaml: is empty; must be a mapping of keys to values"),
        ("# nothing\n", "models.yaml: is empty; must be a mapping of keys to values"),
        ("- chat\n", "models.yaml:1: is a list; must be a mapping of keys to values"),
        ("chat\n", "models.yaml:1: is text; must be a mapping of keys to values"),
        ("7\n", "models.yaml:1: is a number; must be a mapping of keys to values"),
        (
            "server: {port: 1}\n",
            "models.yaml:1: models: has no model; add one such as `chat: {model: FOLDER}`",
        ),
        (
            "models:\n",
            "models.yaml:1: models: has no model; add one such as `chat: {model: FOLDER}`",
        ),
        (
            "models: [chat]\n",
            "models.yaml:1: models: is a list; must be a mapping of keys to values",
        ),
    ],
)
def test_file_without_a_mapping_has_one_problem(box: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(box, text)
    assert refused.value.problems == (message,)


@pytest.mark.parametrize(
    "content", [b"\x7fELF\x02\x00\x01", b"\xff\xfe", b"a: [1\n", b"a: 1\n b: 2"]
)
def test_file_that_is_not_yaml_ends_with_2(box: Path, content: bytes) -> None:
    file = box / "models.yaml"
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("models.yaml")


def test_a_missing_file_ends_with_2(box: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(box / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr == "none.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("max_num_seqs: many", "max_num_seqs: must be an integer; got 'many'"),
        ("enforce_eager: perhaps", "enforce_eager: must be true or false; got 'perhaps'"),
        ("seed: [1]", "seed: must be an integer"),
        ("runner: fast", "runner: must be 'auto', 'generate', 'pooling' or 'draft'; got 'fast'"),
        ("revision: 3", "revision: must be text; 3 is a number in YAML, so put it in quotes"),
    ],
)
def test_engine_argument_of_the_wrong_type_has_its_line(
    box: Path, argument: str, problem: str
) -> None:
    text = f"models:\n  chat:\n    model: m\n    engine:\n      dtype: auto\n      {argument}\n"
    (found,) = problems(box, text)
    assert found.startswith(f"6: models.chat.engine.{problem}")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("port: yes", "server.port"),
        ("drain_timeout: .inf", "server.drain_timeout"),
        ("drain_timeout: .nan", "server.drain_timeout"),
        ("max_body: -1", "server.max_body"),
        ("api_keys: k-one", "server.api_keys"),
        ("host: 1", "server.host"),
    ],
)
def test_invalid_server_value_is_refused(box: Path, entry: str, problem: str) -> None:
    (found,) = problems(box, f"server: {{{entry}}}\nmodels: {{chat: {{model: m}}}}\n")
    assert found.startswith(f"1: {problem}: ")


def test_tls_needs_both_files(box: Path) -> None:
    (box / "key.pem").touch()
    assert problems(box, "server: {ssl_keyfile: key.pem}\nmodels: {chat: {model: m}}\n") == [
        "1: server: TLS needs both ssl_certfile and ssl_keyfile"
    ]


INVALID = [
    ("hiden: true", ".hiden: unknown key; nearest: hidden"),
    ("max-in-flight: 2", ".max-in-flight: unknown key; nearest: max_in_flight"),
    (
        "max_model_len: 2048",
        (
            ".max_model_len: unknown key; it is an engine argument: "
            "write `engine: {max_model_len: ...}`"
        ),
    ),
    ("engine: {hidden: true}", ".engine.hidden: unknown key; it is a key of a model"),
    (
        "engine: {zzzzzz: 1}",
        ".engine.zzzzzz: unknown key; no such engine argument in vLLM 0.32.0",
    ),
    (
        "sampling: {temprature: 1}",
        ".sampling.temprature: unknown key; nearest: temperature",
    ),
    # engine arguments that keys or the plan set
    ("engine: {model: x}", ".engine.model: is set by the model's key `model`; remove it"),
    (
        "engine: {served_model_name: y}",
        ".engine.served_model_name: is set by the model's name and `aliases`; remove it",
    ),
    (
        "engine: {device_ids: [1]}",
        ".engine.device_ids: is set by the plan; use `devices` of the model",
    ),
    (
        "engine: {gpu_memory_utilization: 0.5}",
        (
            ".engine.gpu_memory_utilization: is set by the plan; "
            "use `gpu_memory_utilization` of the model"
        ),
    ),
    (
        "engine: {kv_cache_memory_bytes: 1024}",
        ".engine.kv_cache_memory_bytes: is set by the plan; use `kv_cache` of the model",
    ),
    (
        "engine: {worker_cls: mine.Worker}",
        (
            ".engine.worker_cls: is set by the plan; "
            "remove it: llmserve's own worker measures the memory of a start"
        ),
    ),
    # values
    ("kv_cache: 0", ".kv_cache: must be greater than 0; got 0"),
    ("memory: -1GiB", ".memory: must be a size such as 12GiB or 500MB; got '-1GiB'"),
    ("memory: 12 apples", ".memory: must be a size such as 12GiB or 500MB; got '12 apples'"),
    ("timeout: soon", ".timeout: must be a time such as 30, 90s, 10m or 2d; got 'soon'"),
    ("start: lazzy", ".start: must be 'eager', 'lazy' or 'sleeping'; got 'lazzy'"),
    ("loras: [a]", ".loras: must be a mapping; got a list"),
    ("aliases: [1.10]", ".aliases.0: must be text; 1.10 is a number in YAML, so put it in quotes"),
    ("aliases: [true]", ".aliases.0: must be text; true is a boolean in YAML, so put it in quotes"),
    ("aliases: [~]", ".aliases.0: must be text; ~ is null in YAML, so put it in quotes"),
    (
        "chat_template: 1.10",
        ".chat_template: must be text; 1.10 is a number in YAML, so put it in quotes",
    ),
    (
        "engine: {revision: 1e5}",
        ".engine.revision: must be text; 1e5 is a number in YAML, so put it in quotes",
    ),
    # combinations
    ("devices: []", ".devices: is empty; list GPU ids or UUIDs, or remove the key"),
    (
        "devices: [0, GPU-1], tensor_parallel_size: 2",
        ".devices: mixes ids and UUIDs; use one kind",
    ),
    ("devices: [1, 1], tensor_parallel_size: 2", ".devices: lists a GPU twice"),
    (
        "devices: [0, 1]",
        ": lists 2 devices, but tensor_parallel_size 1 x pipeline_parallel_size 1 needs 1",
    ),
    (
        "devices: [0], tensor_parallel_size: 2, pipeline_parallel_size: 2",
        ": lists 1 devices, but tensor_parallel_size 2 x pipeline_parallel_size 2 needs 4",
    ),
    (
        "start: lazy, max_queue: 0",
        ": max_queue must be greater than 0 with `start: lazy`: the first request waits for the model",
    ),
    ("pinned: true, idle: {stop_after: 1h}", ": has both pinned and idle; remove one of them"),
    (
        "pinned: true, start: sleeping",
        ": has both pinned and `start: sleeping`; remove one of them",
    ),
    (
        "idle: {sleep_after: 2h, stop_after: 1h}",
        ".idle: stop_after must be greater than sleep_after",
    ),
    ("weights: [1]", ": weights need `dispatch: lottery`; it is shortest_queue"),
    ("dispatch: lottery, replicas: 2, weights: [1]", ": 2 replicas need as many weights; got 1"),
]


@pytest.mark.parametrize(("entry", "problem"), INVALID)
def test_invalid_entry_of_a_model_is_one_problem(box: Path, entry: str, problem: str) -> None:
    assert chat_problems(box, entry) == [f"1: models.chat{problem}"]


# --- defaults


def test_defaults_are_merged_key_by_key_and_the_model_wins(box: Path) -> None:
    defaults = """\
defaults:
  max_in_flight: 5
  hidden: true
  sampling: {temperature: 0.5, top_p: 0.9}
  chat_template_kwargs: {think: false}
  engine: {max_model_len: 1000, seed: 7}
"""
    entry = "hidden: false, sampling: {temperature: 0.1}, chat_template_kwargs: {a: 1}, engine: {seed: 8}"
    spec = chat(box, entry, defaults)
    assert spec.max_in_flight == 5
    assert spec.hidden is False
    assert spec.sampling.model_dump(exclude_none=True) == {"temperature": 0.1, "top_p": 0.9}
    assert spec.chat_template_kwargs == {"think": False, "a": 1}
    assert spec.engine == {"max_model_len": 1000, "seed": 8}


TWO = "models:\n  chat: {model: m}\n  embed: {model: m}\n"


@pytest.mark.parametrize(
    ("default", "problem"),
    [
        ("max_in_flight: 0", "max_in_flight: must be greater than 0; got 0"),
        (
            "sampling: {top_p: 2}",
            "sampling.top_p: must be less than or equal to 1; got 2",
        ),
        ("engine: {seed: x}", "engine.seed: must be an integer"),
        ("hiden: true", "hiden: unknown key; nearest: hidden"),
        ("chat_template: missing.jinja", "chat_template: no such file: "),
        (
            "{memory: 1GiB, gpu_memory_utilization: 0.5}",
            "has both memory and gpu_memory_utilization; remove one of them",
        ),
    ],
)
def test_problem_of_defaults_is_reported_once_on_its_line(
    box: Path, default: str, problem: str
) -> None:
    value = default if default.startswith("{") else f"{{{default}}}"
    (found,) = problems(box, f"{TWO}defaults: {value}\n")
    assert found.startswith("4: defaults")
    assert problem in found


def test_problem_of_an_overridden_default_is_reported(box: Path) -> None:
    text = "defaults: {max_in_flight: 0}\nmodels: {chat: {model: m, max_in_flight: 1}}\n"
    assert problems(box, text) == ["1: defaults.max_in_flight: must be greater than 0; got 0"]


def test_a_model_s_memory_replaces_a_default_of_the_other_kind(box: Path) -> None:
    spec = chat(box, "memory: 1GiB", "defaults: {gpu_memory_utilization: 0.3}")
    assert (spec.memory, spec.gpu_memory_utilization) == (2**30, None)


@pytest.mark.parametrize("argument", ["model: x", "served_model_name: x"])
def test_default_of_a_key_of_single_models_is_refused(box: Path, argument: str) -> None:
    (found,) = problems(box, f"{TWO}defaults: {{engine: {{{argument}}}}}\n")
    assert found.startswith(f"4: defaults.engine.{argument.partition(':')[0]}: ")


# --- values


def test_sizes_have_units(box: Path) -> None:
    spec = chat(box, "kv_cache: 12GiB, memory: 1.5GB, engine: {max_model_len: 32k}")
    assert spec.kv_cache == 12 * 2**30
    assert spec.memory == 1_500_000_000
    assert spec.engine == {"max_model_len": 32_000}
    assert chat(box, "engine: {max_model_len: 32K}").engine == {"max_model_len": 32_768}
    assert chat(box, "engine: {max_model_len: auto}").engine == {"max_model_len": -1}
    config = read(box, "server: {max_body: 1MiB}\nmodels: {chat: {model: m}}\n")
    assert config.server.max_body == 2**20


def test_devices_that_fit(box: Path) -> None:
    entry = "devices: [0, 1, 2, 3], tensor_parallel_size: 2, pipeline_parallel_size: 2"
    assert chat(box, entry).devices == (0, 1, 2, 3)
    assert chat(box, "devices: [GPU-8f3a]").devices == ("GPU-8f3a",)


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (
            "chat: {model: m, aliases: [chat]}",
            "chat.aliases.0: the name chat is already used by models.chat",
        ),
        (
            "chat: {model: m, aliases: [a, a]}",
            "chat.aliases.1: the name a is already used by models.chat.aliases.0",
        ),
        (
            "chat: {model: m, aliases: [embed]}, embed: {model: m}",
            "embed: the name embed is already used by models.chat.aliases.0",
        ),
        (
            "chat: {model: m, loras: {sql: org/sql}}, embed: {model: m, aliases: [sql]}",
            "embed.aliases.0: the name sql is already used by models.chat.loras.sql",
        ),
        (
            "a: {model: m, replicas: 2}, 'a/1': {model: m}",
            "a/1: the name a/1 is already used by models.a.replicas",
        ),
    ],
)
def test_a_public_name_leads_to_one_model(box: Path, models: str, problem: str) -> None:
    assert problems(box, f"models: {{{models}}}\n") == [f"1: models.{problem}"]


@pytest.mark.parametrize("name", ["''", "' a'", '"a\\nb"', '"a\\0b"'])
def test_invalid_name_is_refused(box: Path, name: str) -> None:
    (found,) = problems(box, f"models: {{{name}: {{model: m}}}}\n")
    assert "invalid name; must be 1 to 128 printable characters" in found
    assert found.isprintable()


# --- folders, templates, secrets


def test_folders_are_those_beside_the_file(
    box: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for written in ("m", "./m", "../" + box.name + "/m", str(box / "m")):
        (spec,) = read(box, f"models: {{chat: {{model: {written}}}}}\n").models
        assert spec.model == str(box / "m")
        assert not spec.hub_names


def test_source_that_is_no_folder_or_path_is_a_hub_name(box: Path) -> None:
    (spec,) = read(box, "models: {chat: {model: org/name, loras: {sql: org/sql}}}\n").models
    assert spec.model == "org/name"
    assert spec.loras == {"sql": "org/sql"}
    assert spec.hub_names == ("org/name", "org/sql")
    for written in ("./n", "../n", "/n", "~/no-such-folder", "a/b/c", "./m/../n"):
        (found,) = problems(box, f"models: {{chat: {{model: {written}}}}}\n")
        assert found.startswith("1: models.chat.model: no such folder: /")
    assert problems(box, "models: {chat: {model: ''}}\n") != []


def test_a_template_is_a_file_or_the_text_itself(box: Path) -> None:
    text = "{% for m in messages %}${NOT_A_VARIABLE}{{ m }}{% endfor %}\n"
    for encoding in ("utf-8", "utf-8-sig"):  # without its byte order mark
        (box / "chat.jinja").write_text(text, encoding=encoding)
        assert chat(box, "chat_template: chat.jinja").chat_template == text
    assert chat(box, "chat_template: '{{ 1 }}${NOT_A_VARIABLE}'").chat_template == (
        "{{ 1 }}${NOT_A_VARIABLE}"
    )
    assert chat_problems(box, "chat_template: m") == [
        f"1: models.chat.chat_template: no such file: {box / 'm'}"
    ]


def test_template_that_is_not_utf8_is_a_problem(box: Path) -> None:
    (box / "chat.jinja").write_bytes(b"\xff\xfe")
    (found,) = chat_problems(box, "chat_template: chat.jinja")
    assert found.startswith("1: models.chat.chat_template: ")


def keys(folder: Path, written: str) -> list[str]:
    config = read(folder, f"server: {{api_keys: [{written}]}}\nmodels: {{chat: {{model: m}}}}\n")
    return [key.get_secret_value() for key in config.server.api_keys]


def test_secrets_come_from_the_environment_and_from_files(
    box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSERVE_TEST_KEY", "k-env")
    (box / "key").write_text("  k-file \nsecond line\n", encoding="utf-8")
    written = f"'${{LLMSERVE_TEST_KEY}}', 'file:key', 'file: {box / 'key'}', k-plain"
    assert keys(box, written) == ["k-env", "k-file", "k-file", "k-plain"]
    assert chat(box, "engine: {hf_token: 'file:key'}").engine == {"hf_token": "k-file"}


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfk-file\n",
        b"k-file\r\n",
        b"\xef\xbb\xbf k-file\t\r\nsecond\r\n",
        b"k-file",
        b"\xc2\xa0k-file\xc2\xa0\n",
    ],
)
def test_secret_of_a_file_has_no_blanks_or_byte_order_mark(box: Path, content: bytes) -> None:
    (box / "key").write_bytes(content)
    assert keys(box, "'file:key'") == ["k-file"]
    assert keys(box, "' k-plain '") == ["k-plain"]


@pytest.mark.parametrize(
    "content",
    [
        b"k\0ey\n",
        "k\u200bey".encode(),
        "k\ufeffey".encode(),
        b"\x1b[0mk\n",
        b"k" * 4097,
        b"k" * 10**6,
    ],
)
def test_file_with_an_invalid_key_is_refused(box: Path, content: bytes) -> None:
    (box / "key").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        keys(box, "'file:key'")
    (found,) = refused.value.problems
    assert "invalid key; must be one line of at most 4096 printable characters" in found


def test_pipe_for_a_secret_does_not_block(box: Path) -> None:
    os.mkfifo(box / "key")
    with pytest.raises(ConfigError, match="key cannot be read: not a regular file"):
        keys(box, "'file:key'")


def test_secrets_are_not_shown(box: Path) -> None:
    config = read(box, "server: {api_keys: [k-secret]}\nmodels: {chat: {model: m}}\n")
    assert "k-secret" not in repr(config)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("'file:none'", "none cannot be read: No such file or directory"),
        ("'file:m'", "m cannot be read: Is a directory"),
        ("'file:empty'", "is empty; a key needs at least one character"),
        ("'file:bytes'", "bytes cannot be read: not UTF-8 text"),
        ("''", "is empty; a key needs at least one character"),
        ("'${LLMSERVE_NO_SUCH}'", "environment variable LLMSERVE_NO_SUCH is not set"),
        ("7", "must be text; this is a number in YAML, so put it in quotes"),
    ],
)
def test_missing_secret_is_one_problem(box: Path, written: str, problem: str) -> None:
    (box / "empty").touch()
    (box / "bytes").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError) as refused:
        keys(box, f"k-one, {written}")
    (found,) = refused.value.problems
    assert found.startswith("models.yaml:1: server.api_keys.1: ")
    assert found.endswith(problem)


def test_a_dollar_can_be_written(box: Path) -> None:
    assert keys(box, "'a$${B}'") == ["a${B}"]


# --- options of FastChat and vLLM

FASTCHAT = [
    "host", "port", "worker_address", "controller_address", "no_register", "model_path", "model",
    "model_names", "limit_worker_concurrency", "num_gpus", "max_gpu_memory", "load_8bit",
    "conv_template", "trust_remote_code", "gpu_memory_utilization", "tokenizer", "revision",
    "tokenizer_revision", "download_dir", "load_format", "dtype", "block_size",
    "max_num_batched_tokens", "max_num_seqs", "quantization", "enforce_eager", "tokenizer_mode",
    "max_model_len", "seed", "pipeline_parallel_size", "tensor_parallel_size", "worker_use_ray",
    "engine_use_ray", "max_parallel_loading_workers", "swap_space", "max_paddings",
    "max_context_len_to_capture", "disable_log_stats", "disable_log_requests", "max_log_len",
    "dispatch_method", "ssl", "api_keys", "allowed_origins", "allowed_methods", "allowed_headers",
]  # fmt: skip


def unknown(folder: Path, place: str, option: str) -> str:
    """The problem of an option in a section; empty if it is a key there."""
    text = {
        "server": f"server: {{{option}: 1}}\nmodels: {{chat: {{model: m}}}}\n",
        "model": f"models: {{chat: {{model: m, {option}: 1}}}}\n",
        "engine": f"models: {{chat: {{model: m, engine: {{{option}: 1}}}}}}\n",
    }[place]
    try:
        read(folder, text)
    except ConfigError as error:
        return "".join(p for p in error.problems if "unknown key" in p)
    return ""


def places(option: str) -> list[str]:
    """The sections in which an option is a key."""
    keys_of = {
        "server": set(ServerSpec.model_fields),
        "model": ModelSpec.model_fields.keys() - {"name"},
        "engine": set(ENGINE_ARGS),
    }
    return [place for place, known in keys_of.items() if option in known]


@pytest.mark.parametrize("option", FASTCHAT)
def test_every_fastchat_option_is_a_key_or_has_a_successor(box: Path, option: str) -> None:
    for place in places(option):
        assert unknown(box, place, option) == ""
        if "_" in option:
            dashed = unknown(box, place, option.replace("_", "-"))
            assert dashed.endswith(f"unknown key; nearest: {option}")
    if not places(option):
        for place in ("server", "model", "engine"):
            for spelled in (option, option.replace("_", "-")):
                found = unknown(box, place, spelled)
                assert f"FastChat's {spelled} " in found
                assert "`" in found or "was removed: " in found


@pytest.mark.parametrize("option", FASTCHAT)
def test_fastchat_option_in_a_model_names_its_section(box: Path, option: str) -> None:
    suggestions = {
        "model": "",
        "engine": f"it is an engine argument: write `engine: {{{option}: ...}}`",
        "server": "it is a key of server",
    }
    found = unknown(box, "model", option)
    where = places(option)
    expected = suggestions["model" if "model" in where else where[0]] if where else "FastChat's"
    assert expected in found
    assert bool(found) == bool(expected)


def test_every_engine_argument_is_a_key_of_engine(box: Path) -> None:
    arguments: dict[str, Any] = dict.fromkeys(ENGINE_ARGS, "null")
    written = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    found = chat_problems(box, f"engine: {{{written}}}")
    assert [problem for problem in found if "unknown key" in problem] == []


# --- keys and engine arguments


@pytest.mark.parametrize(
    ("default", "own"),
    [
        ("tensor_parallel_size: 4", "tensor_parallel_size: 2"),
        ("reasoning_parser: qwen3", "reasoning_parser: deepseek_r1"),
    ],
)
def test_key_of_a_model_overrides_engine_argument_of_defaults(
    box: Path, default: str, own: str
) -> None:
    assert chat(box, own, f"defaults: {{engine: {{{default}, seed: 7}}}}").engine == {"seed": 7}


def test_devices_count_parallel_sizes_of_engine_arguments(box: Path) -> None:
    sizes = "{tensor_parallel_size: 2, data_parallel_size: 2}"
    assert chat(box, f"devices: [0, 1, 2, 3], engine: {sizes}").devices == (0, 1, 2, 3)
    assert chat_problems(box, "devices: [0], engine: {tensor_parallel_size: 2}") == [
        (
            "1: models.chat: lists 1 devices, but tensor_parallel_size 2 x "
            "pipeline_parallel_size 1 needs 2"
        )
    ]


def test_problem_does_not_show_the_secret(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_TEST_KEY", "sk-very-secret")
    for written in ("${LLMSERVE_TEST_KEY}", "{a: ${LLMSERVE_TEST_KEY}}", "[[sk-very-secret]]"):
        found = problems(box, f"server: {{api_keys: {written}}}\nmodels: {{chat: {{model: m}}}}\n")
        assert found
        assert "sk-very-secret" not in str(found)


def test_device_of_digits_is_an_id_and_empty_is_refused(box: Path) -> None:
    assert chat(box, 'devices: ["1"]').devices == (1,)
    (problem,) = chat_problems(box, 'devices: [""]')
    assert "is empty" in problem


# --- names and text that resemble other types


@pytest.mark.parametrize("name", ["1.10", "010", "1:30", "yes", "null", "2025-10-01", "1e3"])
def test_name_is_the_text_as_written(box: Path, name: str) -> None:
    registry = f"models:\n  {name}: {{model: m, loras: {{{name}-x: m}}}}\n  2.0: {{model: m}}\n"
    first, second = read(box, registry).models
    assert (first.name, list(first.loras), second.name) == (name, [f"{name}-x"], "2.0")


@pytest.mark.parametrize("secret", ["env:KEY", "File:keys", " file:keys", "vault:a/b", "$KEY"])
def test_secret_that_resembles_a_reference_is_refused(box: Path, secret: str) -> None:
    (problem,) = problems(
        box, f"server: {{api_keys: ['{secret}']}}\nmodels: {{chat: {{model: m}}}}\n"
    )
    assert problem.startswith("1: server.api_keys.0: ")
    assert "reference" in problem
    assert "KEY" not in problem


# --- invalid paths


@pytest.mark.parametrize("home", ["~unknown-user/x", "~unknown-user"])
@pytest.mark.parametrize(
    ("registry", "key"),
    [
        ("models: {chat: {model: HOME}}", "models.chat.model"),
        ("models: {chat: {model: m, loras: {a: HOME}}}", "models.chat.loras.a"),
        ("models: {chat: {model: m, chat_template: HOME}}", "models.chat.chat_template"),
        ("models: {chat: {model: m, engine: {download_dir: HOME}}}",
         "models.chat.engine.download_dir"),
        ("models: {chat: {model: m, engine: {tokenizer: HOME}}}", "models.chat.engine.tokenizer"),
        ("server: {log_dir: HOME}\nmodels: {chat: {model: m}}", "server.log_dir"),
        ("server: {admin_key: 'file:HOME'}\nmodels: {chat: {model: m}}", "server.admin_key"),
        ("server: {ssl_certfile: HOME, ssl_keyfile: m}\nmodels: {chat: {model: m}}",
         "server.ssl_certfile"),
    ],
)  # fmt: skip
def test_unknown_home_is_one_problem(box: Path, registry: str, key: str, home: str) -> None:
    found = problems(box, registry.replace("HOME", home) + "\n")
    lead = f"1: {key}: unknown home ~unknown-user; write an absolute path"
    assert found[0] == lead
    assert len([one for one in found if one.startswith(f"1: {key}:")]) == 1


def test_paths_of_engine_arguments_are_resolved(box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(box))
    engine = "engine: {download_dir: ~/hub, tokenizer: ./m, generation_config: vllm}"
    assert chat(box, engine).engine == {
        "download_dir": str(box / "hub"),
        "tokenizer": str(box / "m"),
        "generation_config": "vllm",
    }


@pytest.mark.parametrize("path", ["'./a\0b'", "./" + "x" * 300], ids=["a null", "too long"])
def test_impossible_path_is_a_problem(box: Path, path: str) -> None:
    path = path.replace("'", '"').replace("\0", "\\0")
    for entry in (f"model: {path}", f"model: m, chat_template: {path}"):
        (problem,) = problems(box, f"models: {{chat: {{{entry}}}}}\n")
        assert "no such fol" in problem or "no such file" in problem
    assert "cannot be read: " in "".join(
        problems(
            box,
            f"server: {{admin_key: {path.replace('./', 'file:./')}}}\nmodels: {{chat: {{model: m}}}}\n",
        )
    )


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("a.gguf", "a GGUF file"),
        ("a.safetensors", "a file of weights"),
        ("a.txt", "a file"),
    ],
)
def test_file_given_as_a_model_is_refused(box: Path, file: str, what: str) -> None:
    (box / file).touch()
    assert problems(box, f"models: {{chat: {{model: ./{file}}}}}\n") == [
        (
            f"1: models.chat.model: {box / file} is {what}; "
            "must be a folder with config.json and safetensors files, or a hub name"
        )
    ]
    assert chat_problems(box, f"loras: {{a: {file}}}") == [
        (
            f"1: models.chat.loras.a: {box / file} is {what}; "
            "must be a folder with adapter_config.json and its weights, or a hub name"
        )
    ]


def test_registry_that_is_a_loop_of_links_is_a_problem(box: Path) -> None:
    (box / "models.yaml").symlink_to("models.yaml")
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
        load(box / "models.yaml")
