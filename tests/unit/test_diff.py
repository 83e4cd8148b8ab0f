from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.registry import tls
from llmserve.registry.diff import Changes, changes, describe, document
from llmserve.registry.loader import load
from llmserve.registry.spec import Config, Effect, ModelSpec, ServerSpec, effects

KINDS = ("restarted", "resized", "rebuilt", "live")


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder with the model folders `m` and `n` and two adapters in it."""
    for name in ("m", "n", "a1", "a2"):
        (tmp_path / name).mkdir()
    return tmp_path


def read(folder: Path, text: str) -> Config:
    file = folder / "models.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


def between(folder: Path, old: str, new: str) -> Changes:
    return changes(read(folder, old), read(folder, new))


def of_models(folder: Path, old: str, new: str) -> Changes:
    """The two `models:` in flow style."""
    return between(folder, f"models: {{{old}}}\n", f"models: {{{new}}}\n")


def of_chat(folder: Path, old: str, new: str) -> Changes:
    return of_models(folder, f"chat: {{model: m, {old}}}", f"chat: {{model: m, {new}}}")


def of_server(folder: Path, old: str, new: str) -> Changes:
    models = "models: {chat: {model: m}}\n"
    return between(folder, f"server: {{{old}}}\n{models}", f"server: {{{new}}}\n{models}")


def registry(*specs: ModelSpec, **server: Any) -> Config:
    return Config(file=Path("models.yaml"), server=ServerSpec(**server), models=specs)


def names(of: Changes, kind: str) -> list[str]:
    return [each.new.name for each in getattr(of, kind)]


# --- effects


@pytest.mark.parametrize("spec", [ModelSpec, ServerSpec])
def test_every_key_has_an_effect(spec: type[ModelSpec]) -> None:
    assert set(effects(spec)) == set(spec.model_fields) - {"name"}


def test_effect_of_a_server_key_is_live_or_restarted() -> None:
    assert set(effects(ServerSpec).values()) == {Effect.LIVE, Effect.RESTARTED}


def test_changes_have_a_field_for_every_effect() -> None:
    assert {effect.name.lower() for effect in Effect} == set(KINDS)
    assert set(KINDS) < {field.name for field in dataclasses.fields(Changes)}


# --- a model's fields

CASES = [
    ("model: m", "model: n", "restarted", ["model"]),
    ("devices: [0]", "devices: [1]", "restarted", ["devices"]),
    ("hidden: false", "devices: [0]", "restarted", ["devices"]),
    ("tensor_parallel_size: 1", "tensor_parallel_size: 2", "restarted", ["tensor_parallel_size"]),
    ("concurrency: 1", "concurrency: 2", "restarted", ["concurrency"]),
    ("kv_cache: 1GiB", "kv_cache: 2GiB", "restarted", ["kv_cache"]),
    ("memory: 9GiB", "gpu_memory_utilization: 0.5", "restarted", ["gpu_memory_utilization"]),
    ("hidden: false", "reasoning_parser: qwen3", "restarted", ["reasoning_parser"]),
    ("loras: {a: a1}", "loras: {a: a2}", "restarted", ["loras.a"]),
    ("loras: {a: a1}", "loras: {a: a1, b: a2}", "restarted", ["loras.b"]),
    ("engine: {seed: 1}", "engine: {seed: 2}", "restarted", ["engine.seed"]),
    ("engine: {seed: 1}", "hidden: false", "restarted", ["engine.seed"]),
    (
        "engine: {hf_overrides: {rope: {theta: 1, kind: x}}}",
        "engine: {hf_overrides: {rope: {theta: 2, kind: x}}}",
        "restarted",
        ["engine.hf_overrides.rope.theta"],
    ),
    ("aliases: [a]", "aliases: [a, b]", "rebuilt", ["aliases"]),
    ("chat_template: '{{ 1 }}'", "chat_template: '{{ 2 }}'", "rebuilt", ["chat_template"]),
    (
        "chat_template_kwargs: {think: 1}",
        "chat_template_kwargs: {think: true}",
        "rebuilt",
        ["chat_template_kwargs.think"],
    ),
    ("hidden: false", "tool_call_parser: hermes", "rebuilt", ["tool_call_parser"]),
    ("sampling: {top_k: 1}", "sampling: {top_p: 0.5}", "rebuilt", ["sampling.top_p"]),
    ("hidden: false", "hidden: true", "live", ["hidden"]),
    ("required: false", "required: true", "live", ["required"]),
    ("dispatch: lottery", "dispatch: prefix_affinity", "live", ["dispatch"]),
    ("max_in_flight: 64", "max_in_flight: 128", "live", ["max_in_flight"]),
    ("max_queue: 0", "max_queue: 5", "live", ["max_queue"]),
    ("hidden: false", "timeout: 10m", "live", ["timeout"]),
    ("start: eager", "start: lazy", "live", ["start"]),
    ("pinned: false", "pinned: true", "live", ["pinned"]),
    ("priority: 0", "priority: -1", "live", ["priority"]),
    ("idle: {stop_after: 2h}", "idle: {stop_after: 3h}", "live", ["idle.stop_after"]),
    ("replicas: 1", "replicas: 2", "resized", ["replicas"]),
]


@pytest.mark.parametrize(("old", "new", "kind", "fields"), CASES)
def test_a_changed_field(box: Path, old: str, new: str, kind: str, fields: list[str]) -> None:
    model = "" if old.startswith("model:") else "model: m, "
    found = of_models(box, f"chat: {{{model}{old}}}", f"chat: {{{model}{new}}}")
    assert {each: names(found, each) for each in KINDS} == {
        each: ["chat"] if each == kind else [] for each in KINDS
    }
    (change,) = getattr(found, kind)
    assert set(fields) <= {field.name for field in change.fields}
    assert found.unchanged == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("timeout: 90s", "timeout: 1.5m"),
        ("kv_cache: 1GiB", "kv_cache: 1024MiB"),
        ("devices: ['0']", "devices: [0]"),
        ("loras: {a: a1, b: a2}", "loras: {b: a2, a: a1}"),
        ("chat_template: '{{ 1 }}'", "chat_template: template.jinja"),
        ("replicas: 1", "hidden: false"),
    ],
)
def test_other_notation_of_a_value_is_no_change(box: Path, old: str, new: str) -> None:
    (box / "template.jinja").write_text("{{ 1 }}")
    found = of_chat(box, old, new)
    assert found.unchanged == ("chat",)
    assert describe(found) == []


def test_a_default_reaches_every_model(box: Path) -> None:
    models = "models: {a: {model: m}, b: {model: n}}\n"
    found = between(box, models, f"defaults: {{max_in_flight: 2}}\n{models}")
    assert names(found, "live") == ["a", "b"]


def test_a_template_s_new_text_is_seen_under_its_old_path(box: Path) -> None:
    template, entry = box / "t.jinja", "models: {chat: {model: m, chat_template: t.jinja}}\n"
    template.write_text("{{ 1 }}")
    old = read(box, entry)
    template.write_text("{{ 2 }}")
    assert names(changes(old, read(box, entry)), "rebuilt") == ["chat"]


def test_highest_effect_decides(box: Path) -> None:
    live, rebuilt = "max_queue: 3", "sampling: {top_k: 2}"
    assert names(of_chat(box, "hidden: true", f"{live}, {rebuilt}"), "rebuilt") == ["chat"]
    found = of_chat(box, "hidden: true", f"{live}, {rebuilt}, replicas: 2")
    (change,) = found.resized
    assert {field.name: field.effect for field in change.fields} == {
        "hidden": Effect.LIVE,
        "max_queue": Effect.LIVE,
        "replicas": Effect.RESIZED,
        "sampling.top_k": Effect.REBUILT,
    }
    assert change.rebuilds
    found = of_chat(box, "hidden: true", f"{live}, replicas: 2, engine: {{seed: 1}}")
    assert (names(found, "restarted"), found.resized) == (["chat"], ())


def test_live_change_rebuilds_nothing(box: Path) -> None:
    (change,) = of_chat(box, "hidden: true", "hidden: false").live
    assert not change.rebuilds


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("replicas: 2, devices: [0, 1]", "replicas: 3, devices: [0, 1, 2]", "resized"),
        ("replicas: 3, devices: [0, 1, 2]", "devices: [0]", "resized"),
        ("replicas: 2, devices: [0, 1]", "replicas: 3, devices: [1, 0, 2]", "restarted"),
        ("replicas: 2, devices: [0, 1]", "replicas: 2, devices: [0, 2]", "restarted"),
        ("replicas: 2", "replicas: 3, devices: [0, 1, 2]", "restarted"),
        ("replicas: 2, devices: [0, 1]", "replicas: 3", "restarted"),
        (
            "replicas: 2, devices: [0, 1]",
            "tensor_parallel_size: 2, devices: [0, 1]",
            "restarted",
        ),
    ],
)
def test_replicas_that_keep_their_gpus_continue(box: Path, old: str, new: str, kind: str) -> None:
    assert names(of_chat(box, old, new), kind) == ["chat"]


def test_the_lottery_s_weights_go_with_the_replicas(box: Path) -> None:
    lottery = "dispatch: lottery, "
    old, new = "replicas: 2, weights: [1, 2]", "replicas: 3, weights: [1, 2, 3]"
    assert names(of_chat(box, lottery + old, lottery + new), "resized") == ["chat"]


# --- added and removed models


def test_added_and_removed(box: Path) -> None:
    found = of_models(box, "a: {model: m}, b: {model: m}", "b: {model: m}, c: {model: n}")
    assert [spec.name for spec in found.removed] == ["a"]
    assert [spec.name for spec in found.added] == ["c"]
    assert found.unchanged == ("b",)
    assert describe(found) == ["a: removed", "c: added"]


def test_a_new_name_is_a_removal_and_an_addition(box: Path) -> None:
    found = of_models(box, "a: {model: m}", "b: {model: m, aliases: [a]}")
    assert describe(found) == ["a: removed", "b: added"]


# --- the server

LIVE = [
    ("api_keys: [one]", "api_keys: [two]", "api_keys"),
    ("port: 1", "port: 1, admin_key: one", "admin_key"),
    ("max_body: 1MiB", "max_body: 2MiB", "max_body"),
    ("drain_timeout: 1", "drain_timeout: 2", "drain_timeout"),
    ("port: 1", "port: 1, host_memory: 64GiB", "host_memory"),
]


@pytest.mark.parametrize(("old", "new", "name"), LIVE)
def test_live_key_of_the_server(box: Path, old: str, new: str, name: str) -> None:
    found = of_server(box, old, new)
    assert [field.name for field in found.server] == [name]
    assert found.needs_restart == ()
    assert found.unchanged == ("chat",)


@pytest.mark.parametrize(
    ("new", "names_of"),
    [
        ("port: 1", ("port",)),
        ("host: 0.0.0.0", ("host",)),
        ("gpu_headroom: 0.5", ("gpu_headroom",)),
        ("log_dir: logs", ("log_dir",)),
        ("allowed_origins: ['*']", ("allowed_origins",)),
        ("ssl_certfile: c.pem, ssl_keyfile: c.pem", ("ssl_certfile", "ssl_keyfile")),
    ],
)
def test_key_of_the_server_that_needs_a_restart(
    box: Path, new: str, names_of: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (box / "c.pem").touch()
    monkeypatch.setattr(tls, "problems", lambda *_: {})
    found = of_server(box, "", new)
    assert found.needs_restart == names_of
    assert found.server == ()
    assert describe(found) == [
        f"server.{name}: needs a restart of the server; not changed" for name in names_of
    ]


def test_a_key_s_new_text_is_seen_under_its_old_file(box: Path) -> None:
    text = "server: {admin_key: 'file:key'}\nmodels: {chat: {model: m}}\n"
    (box / "key").write_text("one")
    old = read(box, text)
    (box / "key").write_text("two")
    assert [field.name for field in changes(old, read(box, text)).server] == ["admin_key"]


# --- lines


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "engine: {max_model_len: 4096}",
            "engine: {max_model_len: 8192}",
            "chat: restarts (engine.max_model_len 4096 -> 8192)",
        ),
        (
            "max_in_flight: 64",
            "max_in_flight: 128",
            "chat: changed live (max_in_flight 64 -> 128)",
        ),
        ("hidden: false", "hidden: true", "chat: changed live (hidden false -> true)"),
        ("replicas: 1", "replicas: 2", "chat: resized (replicas 1 -> 2)"),
        (
            "sampling: {top_k: 1, top_p: 0.5}",
            "sampling: {top_k: 2}",
            "chat: changed live (sampling.top_p 0.5 -> omitted, sampling.top_k 1 -> 2)",
        ),
        ("kv_cache: 1GiB", "hidden: false", "chat: restarts (kv_cache 1.0GiB -> omitted)"),
        ("aliases: []", "aliases: [a]", 'chat: changed live (aliases [] -> ["a"])'),
    ],
)
def test_a_line_for_each_model(box: Path, old: str, new: str, line: str) -> None:
    assert describe(of_chat(box, old, new)) == [line]


def test_long_values_are_cut(box: Path) -> None:
    (line,) = describe(of_chat(box, f"chat_template: '{{{{ {'x' * 99} }}}}'", "hidden: false"))
    assert line == f"chat: changed live (chat_template {{{{ {'x' * 37}... -> omitted)"


def test_values_that_differ_beyond_the_cut_are_named_only(box: Path) -> None:
    one, two = f"{'{ ' * 50}1", f"{'{ ' * 50}2"
    found = of_chat(box, f"chat_template: '{one}'", f"chat_template: '{two}'")
    assert describe(found) == ["chat: changed live (chat_template)"]
    (field,) = document(found)["rebuilt"][0]["fields"]
    assert (field["old"], field["new"]) == (one, two)


def test_a_template_of_several_lines_stays_on_one(box: Path) -> None:
    found = of_chat(box, 'chat_template: "{{ 1 }}\\n{{ 2 }}"', "hidden: false")
    assert describe(found) == ["chat: changed live (chat_template {{ 1 }} {{ 2 }} -> omitted)"]


def test_lines_of_the_server_are_last(box: Path) -> None:
    old, new = "server: {max_body: 1MiB}\n", "server: {max_body: 2MiB, port: 1}\n"
    found = between(
        box, f"{old}models: {{a: {{model: m}}}}\n", f"{new}models: {{b: {{model: n}}}}\n"
    )
    assert describe(found) == [
        "a: removed",
        "b: added",
        "server.max_body: changed live (1.0MiB -> 2.0MiB)",
        "server.port: needs a restart of the server; not changed",
    ]


SECRETS = [
    ("server: {api_keys: [SESAME, SESAME2]}", "server: {api_keys: [OPEN-SESAME]}"),
    ("server: {admin_key: SESAME}", "server: {admin_key: OPEN-SESAME}"),
    ("server: {port: 1}", "server: {port: 1, admin_key: SESAME}"),
    ("defaults: {engine: {hf_token: SESAME}}", "defaults: {engine: {hf_token: OPEN-SESAME}}"),
    ("defaults: {engine: {hf_token: SESAME}}", "defaults: {}"),
    (
        "defaults: {}",
        "defaults: {engine: {model_loader_extra_config: {s3: [{access_key: SESAME}]}}}",
    ),
    (
        "defaults: {engine: {model_loader_extra_config: {password: SESAME}}}",
        "defaults: {engine: {model_loader_extra_config: {password: OPEN-SESAME}}}",
    ),
]


@pytest.mark.parametrize(("old", "new"), SECRETS)
def test_secrets_are_not_shown(box: Path, old: str, new: str) -> None:
    models = "models: {chat: {model: m}}\n"
    found = between(box, f"{old}\n{models}", f"{new}\n{models}")
    lines = describe(found)
    assert len(lines) == 1
    assert "SESAME" not in lines[0]
    assert "SESAME" not in json.dumps(document(found))


def test_a_number_of_tokens_is_no_secret(box: Path) -> None:
    old, new = (f"max_num_batched_tokens: {count}" for count in (512, 1024))
    assert describe(of_chat(box, f"engine: {{{old}}}", f"engine: {{{new}}}")) == [
        "chat: restarts (engine.max_num_batched_tokens 512 -> 1024)"
    ]


def test_added_secret_is_shown_as_added(box: Path) -> None:
    assert describe(of_server(box, "port: 1", "port: 1, admin_key: a")) == [
        "server.admin_key: changed live (omitted -> ***)"
    ]
    assert describe(of_server(box, "admin_key: a", "admin_key: b")) == [
        "server.admin_key: changed live"
    ]


# --- as JSON


def test_the_document_holds_all(box: Path) -> None:
    found = between(
        box,
        "server: {max_body: 1MiB}\nmodels: {a: {model: m}, b: {model: n}, c: {model: n, "
        "kv_cache: 1GiB}, d: {model: m, hidden: true}}\n",
        "server: {max_body: 2MiB, log_dir: logs}\nmodels: {x: {model: m}, c: {model: n, "
        "kv_cache: 2GiB}, d: {model: m, hidden: true}, e: {model: m, required: true}}\n",
    )
    assert json.loads(json.dumps(document(found))) == {
        "added": ["x", "e"],
        "removed": ["a", "b"],
        "restarted": [{"model": "c", "fields": [{"name": "kv_cache", "old": 2**30, "new": 2**31}]}],
        "resized": [],
        "rebuilt": [],
        "live": [],
        "unchanged": ["d"],
        "server": [{"name": "max_body", "old": 2**20, "new": 2**21}],
        "needs_restart": ["log_dir"],
    }


# --- any registries


def registries() -> st.SearchStrategy[Config]:
    spec = st.fixed_dictionaries(
        {
            "name": st.sampled_from("abcde"),
            "model": st.sampled_from("mn"),
            "hidden": st.booleans(),
            "replicas": st.integers(1, 2),
            "aliases": st.sampled_from([(), ("x",), ("y", "z")]),
            "engine": st.sampled_from([{}, {"seed": 1}, {"seed": True}]),
        }
    ).map(lambda values: ModelSpec(**values))
    models = st.lists(spec, max_size=5, unique_by=lambda spec: spec.name)
    return models.map(lambda specs: registry(*specs))


@given(registries(), registries())
def test_every_model_is_in_one_list(old: Config, new: Config) -> None:
    found = changes(old, new)
    changed = [change for kind in KINDS for change in getattr(found, kind)]
    after = [each.new.name for each in changed]
    after += [*found.unchanged, *(spec.name for spec in found.added)]
    before = [each.old.name for each in changed]
    before += [*found.unchanged, *(spec.name for spec in found.removed)]
    assert sorted(after) == sorted(spec.name for spec in new.models)
    assert sorted(before) == sorted(spec.name for spec in old.models)


@given(registries(), registries())
def test_change_without_a_restart_keeps_the_engine(old: Config, new: Config) -> None:
    found = changes(old, new)
    for change in (*found.rebuilt, *found.live, *found.resized):
        assert change.old.model == change.new.model
        assert str(change.old.engine) == str(change.new.engine)


@given(registries())
def test_registry_does_not_differ_from_itself(config: Config) -> None:
    found = changes(config, config)
    assert found.unchanged == tuple(spec.name for spec in config.models)
    assert describe(found) == []


@given(registries(), registries())
def test_changes_are_symmetric(old: Config, new: Config) -> None:
    forth, back = changes(old, new), changes(new, old)
    assert set(forth.unchanged) == set(back.unchanged)
    for kind in KINDS:
        assert set(names(forth, kind)) == set(names(back, kind))
