from __future__ import annotations

from training_hub.monitoring.settings import flattened, public_settings, redacted
from training_hub.recipe import Recipe

CANARY = "canary-5c1f"


def test_names_that_look_secret_are_redacted_and_others_are_not():
    secret = ["api_key", "apiKey", "HF_TOKEN", "password", "aws-secret-access-key", "client.secret", "wandbToken"]
    public = ["max_tokens_per_gpu", "keep_last", "tokenizer", "tokens", "monkey", "author", "keywords"]
    shown = redacted(dict.fromkeys(secret + public, CANARY))
    assert {name for name, value in shown.items() if value == CANARY} == set(public)


def test_secrets_inside_addresses_and_known_tokens_are_redacted_wherever_they_stand():
    shown = redacted(
        [
            f"https://me:{CANARY}@host/x",
            f"postgresql://{CANARY}@host/db",
            f"s3://bucket/file?X-Amz-Signature={CANARY}&part=1",
            "hf_" + "a" * 34,
        ]
    )
    assert shown == [
        "https://[redacted]@host/x",
        "postgresql://[redacted]@host/db",
        "s3://bucket/file?X-Amz-Signature=[redacted]&part=1",
        "[redacted]",
    ]


def test_entries_with_secret_names_are_replaced_at_any_depth():
    shown = redacted({"data": {"api_key": CANARY, "tools": [{"token": CANARY}], "thinking": False}})
    assert CANARY not in repr(shown)
    assert shown["data"]["thinking"] is False


def test_public_settings_are_the_whole_recipe_but_for_user_names():
    plain = Recipe.model_validate({"output": "out", "model": {"path": "model"}})
    assert public_settings(plain) == plain.model_dump(mode="json")
    asked = {"mlflow": True, "mlflow_tracking_uri": f"http://{CANARY}@host"}
    named = Recipe.model_validate({"output": "out", "model": {"path": "model"}, "monitoring": asked})
    assert CANARY not in repr(public_settings(named))


def test_settings_flatten_to_dotted_names():
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
