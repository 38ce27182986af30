"""Ollama's own Python package as a client."""

import json

import ollama

from checks import check, main, options, raises, same, wait_until_idle

OPTIONS = options()
MODEL = OPTIONS.model
HELLO = [{"role": "user", "content": "Say hello."}]
GREEDY = {"temperature": 0, "num_predict": 12, "seed": 1}
CLIENT = ollama.Client(
    OPTIONS.base_url, timeout=60, headers={"Authorization": f"Bearer {OPTIONS.api_key}"}
)


def chat(**more):
    return CLIENT.chat(**{"model": MODEL, "messages": HELLO, "options": GREEDY, **more})


def generate(**more):
    asked = {"model": MODEL, "prompt": "Say hello.", "options": GREEDY}
    return CLIENT.generate(**{**asked, **more})


def plain(name):
    """A model's name without the tag that Ollama appends."""
    return name.removesuffix(":latest")


@check
def models_are_listed():
    models = CLIENT.list().models
    names = [plain(model.model) for model in models]
    assert MODEL in names, names
    [own] = [model for model in models if plain(model.model) == MODEL]
    assert own.size > 50_000_000 and own.digest, own
    return names


@check
def a_model_is_shown():
    shown = CLIENT.show(MODEL)
    same(shown.details.family, "llama")
    assert "completion" in shown.capabilities, shown
    return shown.details


@check
def loaded_models_are_listed():
    chat()
    names = [plain(model.model) for model in CLIENT.ps().models]
    assert MODEL in names, names
    return names


@check
def a_chat_is_answered():
    answer = chat()
    same((answer.message.role, answer.done, answer.done_reason), ("assistant", True, "length"))
    same(answer.eval_count, 12)
    assert answer.message.content and answer.prompt_eval_count > 0, answer
    assert answer.total_duration > 0 and answer.eval_duration > 0, answer
    return answer.message.content


@check
def a_streamed_chat_is_the_same_text():
    chunks = list(chat(stream=True))
    same([chunk.done for chunk in chunks if chunk.done], [True])
    same((chunks[-1].done, chunks[-1].done_reason), (True, "length"))
    same("".join(chunk.message.content or "" for chunk in chunks), chat().message.content)
    same(chunks[-1].eval_count, 12)
    assert len(chunks) > 6, f"only {len(chunks)} chunks"


@check
def text_is_generated():
    answer = generate()
    chunks = list(generate(stream=True))
    same("".join(chunk.response or "" for chunk in chunks), answer.response)
    same((answer.done, answer.eval_count, chunks[-1].eval_count), (True, 12, 12))
    assert answer.response, answer
    # The template makes a chat of it, so it is the same question.
    same(answer.response, chat().message.content)
    return answer.response


@check
def raw_text_is_gone_on_with():
    answer = generate(prompt="1, 2, 3, 4,", raw=True)
    assert "5" in answer.response, answer
    return answer.response


@check
def an_answer_fits_the_json_schema():
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    }
    question = [{"role": "user", "content": "Describe a person called Ada, aged 36."}]
    options = {**GREEDY, "num_predict": 80}
    answer = chat(messages=question, format=schema, options=options)
    person = json.loads(answer.message.content)
    assert isinstance(person["name"], str) and isinstance(person["age"], int), person
    return person


@check
def a_tool_is_called():
    # Calls as examples: the small model would rather talk.
    function = {"name": "get_weather", "description": "The weather in a city"}
    city = {"type": "string", "maxLength": 20}
    function["parameters"] = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    conversation = []
    for city in ["Rome", "Oslo", "Berlin", "Madrid"]:
        call = {"function": {"name": "get_weather", "arguments": {"city": city}}}
        conversation += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_name": "get_weather", "content": "20 degrees"},
        ]
    asked = {
        "model": OPTIONS.tools_model,
        "tools": [{"type": "function", "function": function}],
        "options": {**GREEDY, "num_predict": 128},
    }
    # Whether it calls all the same is a matter of the processor's rounding: one city
    # after the other, until it does.
    for city in ["Paris", "Lisbon", "Vienna", "Prague", "Athens", "Dublin"]:
        question = {"role": "user", "content": f"What is the weather in {city}?"}
        asked["messages"] = [*conversation, question]
        if calls := chat(**asked).message.tool_calls:
            break
    [call] = calls
    same(call.function.name, "get_weather")
    chunks = list(chat(**asked, stream=True))
    streamed = [call for chunk in chunks for call in chunk.message.tool_calls or []]
    same([call.function.arguments for call in streamed], [call.function.arguments])
    assert isinstance(call.function.arguments["city"], str), call
    return call.function.arguments


@check
def embeddings_are_given():
    texts = ["The cat sleeps.", "A cat is asleep.", "Stock prices fell sharply."]
    answer = CLIENT.embed(model=OPTIONS.embeddings_model, input=texts)
    same([len(vector) for vector in answer.embeddings], [576, 576, 576])
    first, near, far = answer.embeddings
    product = lambda one, other: sum(a * b for a, b in zip(one, other))
    assert product(first, near) > product(first, far)
    alone = CLIENT.embed(model=OPTIONS.embeddings_model, input=texts[0]).embeddings[0]
    assert max(abs(a - b) for a, b in zip(alone, first)) < 1e-3


@check
def an_unknown_model_is_not_found():
    for stream in (False, True):
        ask = lambda: list(chat(model=MODEL + "u", stream=stream))
        error = raises(ollama.ResponseError, ask)
        same(error.status_code, 404)
        assert MODEL in error.error, error.error
    return error.error


@check
def what_cannot_be_mapped_is_refused():
    error = raises(ollama.ResponseError, lambda: CLIENT.create(model="mine", from_=MODEL))
    assert error.status_code >= 400 and len(error.error) > 10, error.error
    return error.status_code, error.error


@check
def a_closed_stream_frees_its_slot():
    options = {"num_predict": 2000, "temperature": 0}
    stream = generate(prompt="1, 2, 3, 4, 5, 6, 7,", raw=True, stream=True, options=options)
    for _ in range(5):
        next(stream)
    stream.close()
    return wait_until_idle(limit=5)


main()
