"""Named checks against a server: each is run, and what it saw is printed.

A script registers its checks with `@check` and ends with `main(...)`. The exit
code is 1 if one check failed, and all others are run nevertheless.

`--engine` is for a bare llama-server instead of the daemon: the checks marked
`daemon=True` are about what only the daemon promises, and are named and left
out there.
"""

import argparse
import json
import sys
import time
import traceback
import urllib.request

REGISTERED = []
PARSER = argparse.ArgumentParser()
PARSER.add_argument("--base-url", required=True, help="without /v1")
PARSER.add_argument("--embeddings-base-url", help="a second bare engine, with --embeddings")
PARSER.add_argument("--api-key", default="none")
PARSER.add_argument("--model", default="haiku")
PARSER.add_argument("--tools-model", default="tools", help="one with a template that knows tools")
PARSER.add_argument("--embeddings-model", default="embeddings")
PARSER.add_argument("--narrow-model", default="narrow", help="one where one task may wait")
PARSER.add_argument("--alias", default="gpt-4o-mini")
PARSER.add_argument("--engine", action="store_true", help="the server is a bare llama-server")
PARSER.add_argument("--only", default="", help="run checks whose names hold this")
OPTIONS = argparse.Namespace()


def check(function=None, *, daemon=False):
    """Registers a check; its name is the function's."""

    def register(function):
        REGISTERED.append((function, daemon))
        return function

    return register if function is None else register(function)


def options():
    PARSER.parse_args(namespace=OPTIONS)
    if OPTIONS.embeddings_base_url is None:
        OPTIONS.embeddings_base_url = OPTIONS.base_url
    return OPTIONS


def main():
    failed, ran = [], 0
    for function, daemon in REGISTERED:
        name = function.__name__
        if OPTIONS.only not in name:
            continue
        if daemon and OPTIONS.engine:
            print(f"left out  {name}: it is about the daemon", flush=True)
            continue
        begun, ran = time.monotonic(), ran + 1
        try:
            seen = function()
            verdict = "ok      "
        except Exception as error:
            seen = f"{type(error).__name__}: {error}"
            verdict = "FAILED  "
            failed.append(name)
            traceback.print_exc()
        print(f"{verdict}  {name} ({time.monotonic() - begun:.2f} s) {seen or ''}", flush=True)
    print(f"{ran} checks, {len(failed)} failed: {failed}", flush=True)
    # No check at all would be a proof of nothing.
    sys.exit(1 if failed or ran == 0 else 0)


def same(seen, expected):
    assert seen == expected, f"seen {seen!r}, expected {expected!r}"


def raises(kind, function):
    """The error of this very kind that `function` must end with."""
    try:
        answer = function()
    except Exception as error:
        assert type(error) is kind, f"{kind.__name__} expected, seen {type(error).__name__}: {error}"
        return error
    raise AssertionError(f"{kind.__name__} expected, seen an answer: {answer!r}")


def daemon_get(path):
    """JSON from one of the daemon's own routes."""
    request = urllib.request.Request(
        OPTIONS.base_url + path, headers={"Authorization": f"Bearer {OPTIONS.api_key}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def wait_until(what, look, limit=10.0):
    """Waits until `look` finds something."""
    deadline = time.monotonic() + limit
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not seen within {limit} s"
        time.sleep(0.02)


def wait_until_idle(limit=10.0):
    """Waits until no pool of the daemon has a running or waiting task."""

    def idle():
        pools = daemon_get("/v2/pools")["pools"]
        waiting = sum(pool["queue"]["interactive"] + pool["queue"]["batch"] for pool in pools)
        return waiting + sum(pool["running"] for pool in pools) == 0

    begun = time.monotonic()
    wait_until("pools without a task", idle, limit)
    return f"idle after {1000 * (time.monotonic() - begun):.0f} ms"
