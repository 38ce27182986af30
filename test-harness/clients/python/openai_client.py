"""OpenAI's own SDK as a client."""

import concurrent.futures
import json
import urllib.request

import openai

from checks import check, daemon_get, main, options, raises, same, wait_until, wait_until_idle

OPTIONS = options()
URL = OPTIONS.base_url + "/v1"
MODEL = OPTIONS.model
HELLO = [{"role": "user", "content": "Say hello."}]
LONG = [{"role": "user", "content": "Count from one to one thousand in words."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
# Four calls as examples: the small model would rather talk, which `required` does
# not forbid before a call.
CONVERSATION = []
for city in ["Rome", "Oslo", "Berlin", "Madrid"]:
    arguments = json.dumps({"city": city})
    call = {"name": "get_weather", "arguments": arguments}
    CONVERSATION += [
        {"role": "user", "content": f"What is the weather in {city}?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": f"call_{city}", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": f"call_{city}", "content": "20 degrees"},
    ]
CONVERSATION.append({"role": "user", "content": "What is the weather in Paris?"})
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def client(**more):
    settings = {"base_url": URL, "api_key": OPTIONS.api_key, "max_retries": 0, "timeout": 60}
    return openai.OpenAI(**{**settings, **more})


CLIENT = client()
EMBEDDINGS = client(base_url=OPTIONS.embeddings_base_url + "/v1")


def chat(who=CLIENT, **more):
    settings = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0, "seed": 1}
    return who.chat.completions.create(**{**settings, **more})


def text_of(chunks):
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    return "".join(deltas)


@check
def models_are_listed():
    models = CLIENT.models.list().data
    ids = [model.id for model in models]
    assert MODEL in ids, ids
    same({model.object for model in models}, {"model"})
    return ids


@check(daemon=True)
def one_model_is_shown():
    same(CLIENT.models.retrieve(MODEL).id, MODEL)
    raises(openai.NotFoundError, lambda: CLIENT.models.retrieve("no-such-model"))


@check
def a_chat_is_answered():
    answer = chat()
    [choice] = answer.choices
    same(answer.object, "chat.completion")
    same((choice.message.role, choice.finish_reason), ("assistant", "length"))
    same(answer.usage.completion_tokens, 12)
    same(answer.usage.total_tokens, answer.usage.prompt_tokens + 12)
    assert choice.message.content, answer
    return choice.message.content


@check
def a_streamed_chat_is_the_same_text():
    chunks = list(chat(stream=True))
    same({chunk.object for chunk in chunks}, {"chat.completion.chunk"})
    same(len({chunk.id for chunk in chunks}), 1)
    # Without `include_usage` no chunk speaks of it, and none is without a choice.
    same([chunk for chunk in chunks if chunk.usage or not chunk.choices], [])
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    same([reason for reason in reasons if reason], ["length"])
    assert len(chunks) > 6, f"only {len(chunks)} chunks"
    same(text_of(chunks), chat().choices[0].message.content)


@check
def usage_comes_at_the_end_of_a_stream_that_asks_for_it():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    last = chunks.pop()
    same([chunk.usage for chunk in chunks if chunk.usage], [])
    same(last.choices, [])
    same(last.usage.completion_tokens, 12)
    same(text_of(chunks), chat().choices[0].message.content)


@check
def several_choices_are_answered():
    answer = chat(n=2, temperature=0.8)
    same(sorted(choice.index for choice in answer.choices), [0, 1])


@check
def a_stop_word_ends_the_answer():
    whole = chat(max_tokens=30).choices[0].message.content
    stop = whole.split()[3]
    choice = chat(max_tokens=30, stop=[stop]).choices[0]
    same(choice.finish_reason, "stop")
    same(choice.message.content, whole[: whole.index(stop)])


@check
def completions_are_answered():
    settings = {"model": MODEL, "prompt": "1, 2, 3, 4,", "max_tokens": 8, "temperature": 0}
    answer = CLIENT.completions.create(**settings)
    same((answer.object, answer.usage.completion_tokens), ("text_completion", 8))
    chunks = list(CLIENT.completions.create(**settings, stream=True))
    streamed = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    same(streamed, answer.choices[0].text)
    return answer.choices[0].text


@check
def a_tool_is_called():
    asked = {
        "model": OPTIONS.tools_model,
        "messages": CONVERSATION,
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 128,
    }
    choice = chat(**asked).choices[0]
    [call] = choice.message.tool_calls
    same((choice.finish_reason, call.function.name), ("tool_calls", "get_weather"))
    city = json.loads(call.function.arguments)["city"]
    assert isinstance(city, str), call

    name, arguments = "", ""
    for chunk in chat(**asked, stream=True):
        for delta in [choice.delta for choice in chunk.choices]:
            for piece in delta.tool_calls or []:
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
    same((name, json.loads(arguments)), ("get_weather", {"city": city}))

    # The conversation goes on with the tool's answer.
    told = [choice.message.model_dump(exclude_none=True)]
    told.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"})
    asked.update(messages=CONVERSATION + told, tool_choice="none")
    words = chat(**asked).choices[0].message
    same(words.tool_calls, None)
    return city, words.content


@check
def an_answer_fits_the_json_schema():
    schema = {"name": "person", "strict": True, "schema": PERSON}
    answer = chat(
        messages=[{"role": "user", "content": "Describe a person called Ada, aged 36."}],
        response_format={"type": "json_schema", "json_schema": schema},
        max_tokens=80,
    )
    person = json.loads(answer.choices[0].message.content)
    same(sorted(person), ["age", "name"])
    assert isinstance(person["name"], str) and 1 <= person["age"] <= 99, person
    return person


@check
def log_probabilities_are_given():
    choice = chat(logprobs=True, top_logprobs=3, max_tokens=4).choices[0]
    same(len(choice.logprobs.content), 4)
    for token in choice.logprobs.content:
        same(len(token.top_logprobs), 3)
        assert token.logprob <= 0, token


@check
def the_engines_own_parameters_are_passed_on():
    answer = chat(extra_body={"grammar": 'root ::= "yes" | "no"', "top_k": 5})
    assert answer.choices[0].message.content in ("yes", "no"), answer


@check
def embeddings_are_given():
    texts = ["The cat sleeps.", "A cat is asleep.", "Stock prices fell sharply."]
    # As the SDK asks by default (base64), and as numbers.
    ask = lambda **more: EMBEDDINGS.embeddings.create(
        model=OPTIONS.embeddings_model, input=texts, **more
    )
    answer, plain = ask(), ask(encoding_format="float")
    same([item.index for item in answer.data], [0, 1, 2])
    vectors = [item.embedding for item in answer.data]
    same({len(vector) for vector in vectors}, {576})
    difference = max(
        abs(one - other)
        for item, same_item in zip(answer.data, plain.data)
        for one, other in zip(item.embedding, same_item.embedding)
    )
    assert difference < 1e-5, difference
    near, far = (sum(a * b for a, b in zip(vectors[0], other)) for other in vectors[1:])
    assert near > far, (near, far)
    assert answer.usage.prompt_tokens > 0, answer.usage


@check
def responses_are_answered():
    settings = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 12, "temperature": 0}
    answer = CLIENT.responses.create(**settings)
    same(answer.object, "response")
    assert answer.output_text, answer
    same(answer.usage.output_tokens, 12)
    events = list(CLIENT.responses.create(**settings, stream=True))
    kinds = [event.type for event in events]
    same((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    same("".join(deltas), answer.output_text)
    return answer.output_text


@check(daemon=True)
def an_unknown_model_is_not_found():
    for stream in (False, True):
        error = raises(openai.NotFoundError, lambda: chat(model=MODEL + "u", stream=stream))
        same((error.code, error.type), ("model_not_found", "invalid_request_error"))
        same(error.param, "model")
        assert MODEL in error.message, error.message
    return error.message


@check
def a_bad_parameter_is_a_bad_request():
    error = raises(openai.BadRequestError, lambda: chat(temperature="warm"))
    assert error.body["message"], error.body
    raises(openai.BadRequestError, lambda: chat(messages="hello"))
    raises(openai.BadRequestError, lambda: chat(messages="hello", stream=True))
    return error.body


@check
def a_prompt_longer_than_the_context_is_a_bad_request():
    long = [{"role": "user", "content": "word " * 12_000}]
    error = raises(openai.BadRequestError, lambda: chat(messages=long))
    return error.body


@check(daemon=True)
def ids_are_in_the_headers():
    sent = {"X-Correlation-Id": "from-the-sdk-1"}
    raw = CLIENT.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=2, extra_headers=sent
    )
    same(raw.headers["X-Correlation-Id"], "from-the-sdk-1")
    task = daemon_get("/v2/tasks/" + raw.headers["X-Task-Id"])
    same((task["status"], task["correlation_id"]), ("completed", "from-the-sdk-1"))
    same(task["text"], raw.parse().choices[0].message.content)


@check(daemon=True)
def an_alias_is_a_model():
    same(chat(model=OPTIONS.alias).choices[0].message.content, chat().choices[0].message.content)


@check(daemon=True)
def a_closed_stream_frees_its_slot():
    stream = chat(messages=LONG, max_tokens=2000, stream=True, extra_body={"ignore_eos": True})
    seen = [next(stream) for _ in range(5)]
    running = sum(pool["running"] for pool in daemon_get("/v2/pools")["pools"])
    same((len(seen), running), (5, 1))
    stream.close()
    return wait_until_idle(limit=5)


@check(daemon=True)
def a_client_that_gives_up_waiting_frees_its_slot():
    impatient = client(timeout=0.4)
    ask = lambda: chat(impatient, messages=LONG, max_tokens=2000, extra_body={"ignore_eos": True})
    raises(openai.APITimeoutError, ask)
    return wait_until_idle(limit=5)


@check(daemon=True)
def a_full_queue_is_a_rate_limit_that_passes():
    model = OPTIONS.narrow_model
    long = {"model": model, "messages": LONG, "max_tokens": 2000, "stream": True}
    stream = chat(**long, extra_body={"ignore_eos": True})
    next(stream)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(chat, model=model)

        def pool():
            [found] = [p for p in daemon_get("/v2/pools")["pools"] if p["pool_id"] == model]
            return found["running"], found["queue"]["interactive"]

        wait_until("one task runs and one waits", lambda: pool() == (1, 1))
        error = raises(openai.RateLimitError, lambda: chat(model=model))
        assert float(error.response.headers["Retry-After"]) > 0, error.response.headers
        # The SDK tries again by itself, as often as it is told to.
        patient = threads.submit(chat, client(max_retries=8), model=model)
        wait_until("a second refusal", lambda: refusals(model) > 1)
        stream.close()
        same(patient.result(60).choices[0].message.content, waiting.result(60).choices[0].message.content)
    return error.response.headers["Retry-After"], error.body


def refusals(model):
    with urllib.request.urlopen(OPTIONS.base_url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    own = [line for line in lines if line.startswith("orchestratord_tasks_refused_total{")]
    return sum(float(line.split()[-1]) for line in own if f'"{model}"' in line)


@check
def several_at_once_get_their_own_answers():
    words = ["red", "green", "blue", "white", "black", "brown"]
    ask = lambda word: chat(messages=[{"role": "user", "content": f"Repeat: {word} {word}"}])
    alone = [ask(word).choices[0].message.content for word in words]
    with concurrent.futures.ThreadPoolExecutor(len(words)) as threads:
        together = [answer.choices[0].message.content for answer in threads.map(ask, words)]
    same(together, alone)


main()
