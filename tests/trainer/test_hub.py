"""Uploads to the Hub: huggingface_hub's own, to a server on this machine that keeps them."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = "someone/small"
TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """Repositories that were made, and what each commit put where."""

    url: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    revisions: set[str] = field(default_factory=set)
    refuses: bool = False


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers["Authorization"])
            self._answer(403 if hub.refuses else 200, self._reply(body))

        def do_GET(self) -> None:
            self._answer(
                403 if hub.refuses else 200, {"id": REPOSITORY, "sha": "0" * 40, "siblings": []}
            )

        def _reply(self, body: bytes) -> Any:
            if self.path.endswith("/repos/create"):
                hub.made.append(json.loads(body))
                return {"url": f"{hub.url}/{REPOSITORY}", "id": REPOSITORY, "name": REPOSITORY}
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                keep = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                return {"files": [{"path": one["path"], **keep} for one in files]}
            if "/commit/" in self.path:
                hub.revisions.add(self.path.partition("/commit/")[2].partition("?")[0])
                return self._commit(body)
            return {}

        def _commit(self, body: bytes) -> Any:
            lines = [json.loads(line) for line in body.splitlines()]
            title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            hub.commits[title] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            url = f"{hub.url}/{REPOSITORY}/commit/{'1' * 40}"
            return {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}

        def _answer(self, status: int, value: Any) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Nothing on the console."""

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    kept = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(kept))
    kept.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kept
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from tests.trainer.samples import trainer
options = dict(max_steps=4, save_strategy="steps", save_steps=2)
run = trainer(sys.argv[1], push_to_hub=True, hub_model_id="someone/small", hub_token=sys.argv[2],
              hub_strategy="all_checkpoints", hub_always_push=True, hub_private_repo=True,
              hub_revision="trial", **options)
run.model.add_model_tags(["toy"])
run.train()
print("commit", run.push_to_hub(dataset="points").oid)
"""


def run_script(hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "small"), TOKEN],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_models_checkpoints_and_the_card_are_uploaded_and_no_secret(
    hub: Hub, tmp_path: Path
) -> None:
    done = run_script(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"commit {'1' * 40}" in done.stdout
    assert hub.made[0]["visibility"] == "private" and hub.revisions == {"trial"}
    assert hub.made[0]["name"] == "small" and hub.tokens == {f"Bearer {TOKEN}"}
    final = hub.commits["End of training"]
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= set(final)
    assert b"- toy" in final["README.md"]
    assert "model.safetensors" in hub.commits["Training in progress, step 2"]
    checkpoint = hub.commits["Training in progress, step 4, checkpoint"]
    assert {"checkpoint-4/optimizer.pt", "checkpoint-4/trainer_state.json"} <= set(checkpoint)
    uploaded = [(p, data) for files in hub.commits.values() for p, data in files.items()]
    assert not [path for path, _ in uploaded if re.search(r"(^|/)(plans|logs|\.)", path)]
    assert not [path for path, data in uploaded if TOKEN.encode() in data]


def test_a_hub_that_refuses_is_said_before_anything_is_trained(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    done = run_script(hub, tmp_path)
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()
    assert any("push_to_hub: the repository can't be opened" in line for line in said)
    assert "hf auth login" in done.stderr and "training 4 steps" not in done.stdout + done.stderr
