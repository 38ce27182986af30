"""Anthropic's own SDK as a client."""

import anthropic

from checks import check, daemon_get, main, options, raises, same, wait_until_idle

OPTIONS = options()
MODEL = OPTIONS.model
HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def client(**more):
    settings = {"base_url": OPTIONS.base_url, "api_key": OPTIONS.api_key, "max_retries": 0}
    return anthropic.Anthropic(**{**settings, "timeout": 60, **more})


CLIENT = client()


def settings(**more):
    # The SDK has no `temperature` of its own any more.
    extra = {"temperature": 0, **more.pop("extra_body", {})}
    return {"model": MODEL, "messages": HELLO, "max_tokens": 12, "extra_body": extra, **more}


def message(**more):
    return CLIENT.messages.create(**settings(**more))


@check
def a_message_is_answered():
    answer = message()
    same((answer.type, answer.role, answer.stop_reason), ("message", "assistant", "max_tokens"))
    [block] = answer.content
    same((block.type, answer.usage.output_tokens), ("text", 12))
    assert block.text and answer.usage.input_tokens > 0, answer
    return block.text


@check
def a_streamed_message_is_the_same_text():
    whole = message().content[0].text
    with CLIENT.messages.stream(**settings()) as stream:
        kinds, pieces = [], []
        for event in stream:
            kinds.append(event.type)
            if event.type == "content_block_delta":
                pieces.append(event.delta.text)
        final = stream.get_final_message()
    same((kinds[0], kinds[-1]), ("message_start", "message_stop"))
    same(("".join(pieces), final.content[0].text), (whole, whole))
    same((final.stop_reason, final.usage.output_tokens), ("max_tokens", 12))
    assert len(pieces) > 6, pieces


@check
def plain_events_come_by_their_names():
    kinds = [event.type for event in message(stream=True)]
    same(kinds[:2], ["message_start", "content_block_start"])
    same(kinds[-3:], ["content_block_stop", "message_delta", "message_stop"])


@check
def a_system_prompt_counts():
    plain, more = message(), message(system="You are a pirate. Answer as one, always.")
    assert more.usage.input_tokens != plain.usage.input_tokens, more.usage
    # The tokens that the engine took from its cache are counted apart.
    counted = CLIENT.messages.count_tokens(model=MODEL, messages=HELLO, system="You are a pirate.")
    assert counted.input_tokens > 0
    return more.content[0].text


@check
def tokens_are_counted():
    short = CLIENT.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    long = [{"role": "user", "content": "Say hello. " * 20}]
    more = CLIENT.messages.count_tokens(model=MODEL, messages=long).input_tokens
    usage = message().usage
    same(short, usage.input_tokens + (usage.cache_read_input_tokens or 0))
    assert more > short + 19, (short, more)
    return short, more


@check
def a_stop_sequence_ends_the_answer():
    whole = message(max_tokens=30).content[0].text
    stop = whole.split()[3]
    answer = message(max_tokens=30, stop_sequences=[stop])
    same(answer.stop_sequence, stop)
    # The engine (b11434) names the sequence, but calls the reason `end_turn`.
    assert answer.stop_reason in ("stop_sequence", "end_turn"), answer
    same(answer.content[0].text, whole[: whole.index(stop)])


@check
def a_tool_is_called():
    # Calls as examples: the small model would rather talk.
    conversation, answered = [], []
    for city in ["Rome", "Oslo", "Berlin", "Madrid"]:
        question = {"type": "text", "text": f"What is the weather in {city}?"}
        call = {"type": "tool_use", "id": f"toolu_{city}", "name": "get_weather"}
        conversation += [
            {"role": "user", "content": answered + [question]},
            {"role": "assistant", "content": [{**call, "input": {"city": city}}]},
        ]
        answered = [{"type": "tool_result", "tool_use_id": call["id"], "content": "20 degrees"}]
    question = {"type": "text", "text": "What is the weather in Paris?"}
    conversation.append({"role": "user", "content": answered + [question]})
    asked = {
        "model": OPTIONS.tools_model,
        "messages": conversation,
        "tools": [WEATHER],
        "tool_choice": {"type": "any"},
        "max_tokens": 128,
    }
    answer = message(**asked)
    [call] = [block for block in answer.content if block.type == "tool_use"]
    same((answer.stop_reason, call.name), ("tool_use", "get_weather"))
    with CLIENT.messages.stream(**settings(**asked)) as stream:
        final = stream.get_final_message()
    [streamed] = [block for block in final.content if block.type == "tool_use"]
    same((streamed.name, streamed.input), (call.name, call.input))
    assert isinstance(call.input["city"], str), call
    return call.input


@check(daemon=True)
def an_unknown_model_is_not_found():
    for stream in (False, True):
        error = raises(anthropic.NotFoundError, lambda: message(model=MODEL + "u", stream=stream))
        same((error.body["type"], error.body["error"]["type"]), ("error", "not_found_error"))
        assert MODEL in error.body["error"]["message"], error.body
    return error.body


@check(daemon=True)
def a_bad_parameter_is_an_invalid_request():
    for stream in (False, True):
        ask = lambda: message(messages=[{"role": "user", "content": 5}], stream=stream)
        error = raises(anthropic.BadRequestError, ask)
        same((error.body["type"], error.body["error"]["type"]), ("error", "invalid_request_error"))
    return error.body


@check(daemon=True)
def ids_are_in_the_headers():
    raw = CLIENT.messages.with_raw_response.create(**settings())
    task = daemon_get("/v2/tasks/" + raw.headers["X-Task-Id"])
    same((task["status"], task["text"]), ("completed", raw.parse().content[0].text))
    same(task["correlation_id"], raw.headers["X-Correlation-Id"])


@check(daemon=True)
def a_closed_stream_frees_its_slot():
    more = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    stream = message(**more, stream=True)
    for _ in range(6):
        next(stream)
    same(sum(pool["running"] for pool in daemon_get("/v2/pools")["pools"]), 1)
    stream.close()
    return wait_until_idle(limit=5)


main()
