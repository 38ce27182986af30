"""Right and wrong keys, in each SDK's own way, at a daemon with a token."""

import anthropic
import ollama
import openai

from checks import check, main, options, raises, same

OPTIONS = options()
MODEL = OPTIONS.model
HELLO = [{"role": "user", "content": "Say hello."}]


def ask_openai(key):
    client = openai.OpenAI(base_url=OPTIONS.base_url + "/v1", api_key=key, max_retries=0)
    return client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)


def ask_anthropic(**key):
    client = anthropic.Anthropic(base_url=OPTIONS.base_url, max_retries=0, **key)
    return client.messages.create(model=MODEL, messages=HELLO, max_tokens=2)


def ask_ollama(key):
    client = ollama.Client(OPTIONS.base_url, headers={"Authorization": f"Bearer {key}"})
    return client.chat(MODEL, HELLO, options={"num_predict": 2})


@check
def openais_key():
    assert ask_openai(OPTIONS.api_key).choices[0].message
    error = raises(openai.AuthenticationError, lambda: ask_openai("wrong"))
    same(error.status_code, 401)
    return error.body


@check
def anthropics_key():
    # It goes as `x-api-key`, and a token as a bearer.
    assert ask_anthropic(api_key=OPTIONS.api_key).content
    assert ask_anthropic(auth_token=OPTIONS.api_key).content
    error = raises(anthropic.AuthenticationError, lambda: ask_anthropic(api_key="wrong"))
    same(error.body["error"]["type"], "authentication_error")
    return error.body


@check
def ollamas_key():
    assert ask_ollama(OPTIONS.api_key).message
    error = raises(ollama.ResponseError, lambda: ask_ollama("wrong"))
    same(error.status_code, 401)
    return error.error


main()
