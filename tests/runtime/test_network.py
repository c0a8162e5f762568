"""Whether a server answers, by its address as a user has typed it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.runtime.network import require_answer
from tests.helpers.json_server import JsonHandler, serving


class Locked(JsonHandler):
    def answer(self) -> tuple[int, Any]:
        return 401, {"error": "log in"}


def test_a_server_that_wants_a_login_answers_and_a_password_in_its_address_is_no_obstacle() -> None:
    with serving(Locked) as url:
        require_answer(url, 5.0)
        require_answer(url.replace("://", "://me:geheim@"), 5.0)


@pytest.mark.parametrize(
    "address",
    ["http://me:geheim@127.0.0.1:9", "http://127.0.0.1:geheim", "http://127.0.0.1/ geheim", "geheim", "http://["],
)
def test_what_does_not_answer_is_an_os_error_without_the_address(address: str) -> None:
    with pytest.raises(OSError, match=r"refused|no HTTP server") as raised:
        require_answer(address, 5.0)
    assert "geheim" not in str(raised.value)
