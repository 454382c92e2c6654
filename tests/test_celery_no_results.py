"""`result_backend="relay://…"`, as where a program has one URL for both."""

from __future__ import annotations

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured


@pytest.mark.parametrize("start", ["relay://", "relays://", "relay+unix://", "relay+sentinel://", "relays+cluster://"])
def test_relay_as_a_result_backend_is_refused_by_the_setting_s_name_and_shows_no_password(start: str) -> None:
    app = Celery("mine", broker="relay://localhost", backend=f"{start}:secret@localhost/0", set_as_current=False)
    with pytest.raises(ImproperlyConfigured, match="result_backend: relay keeps no results") as refused:
        app.send_task("nothing")
    assert "secret" not in str(refused.value)
    app.close()
