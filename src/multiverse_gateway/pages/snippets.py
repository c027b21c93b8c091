"""Code that calls a model through the gateway, for the pages to show."""

import json
import shlex


def snippets_of(base_url: str, model: str, *, needs_key: bool, streams: bool = True, embeds: bool = False) -> dict[str, str]:
    """Return code that calls a model, by language, each with the line that installs its library.

    The code sends a chat completion, streamed if the model `streams`; if the model `embeds` instead of chatting, it asks for an embedding.
    """
    key = "your-client-key" if needs_key else "not-needed"
    made = _Snippets(base_url, model, key)
    body: dict[str, object] = {"model": model}
    if embeds:
        python, node, path = made.python_embedding(), made.node_embedding(), "/embeddings"
        body["input"] = "Hello!"
    else:
        python, node = (made.python_stream(), made.node_stream()) if streams else (made.python_chat(), made.node_chat())
        path = "/chat/completions"
        body |= {"messages": [{"role": "user", "content": "Hello!"}], **({"stream": True} if streams else {})}
    curl = (
        f"curl {'-N ' if streams and not embeds else ''}{shlex.quote(base_url + path)} \\\n"
        + (f'  -H "Authorization: Bearer {key}" \\\n' if needs_key else "")
        + '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(json.dumps(body))}\n"
    )
    return {"Python": made.python_client() + python, "Node": made.node_client() + node, "curl": curl}


class _Snippets:
    """The parts of the snippets in Python and Node."""

    def __init__(self, base_url: str, model: str, key: str) -> None:
        self._base_url, self._model, self._key = json.dumps(base_url), json.dumps(model), json.dumps(key)

    def python_client(self) -> str:
        return (
            "# pip install openai\nfrom openai import OpenAI\n\n"
            f"client = OpenAI(\n    base_url={self._base_url},\n    api_key={self._key},\n)\n"
        )

    def node_client(self) -> str:
        return (
            '// npm install openai\nimport OpenAI from "openai";\n\n'
            f"const client = new OpenAI({{\n  baseURL: {self._base_url},\n  apiKey: {self._key},\n}});\n"
        )

    def python_stream(self) -> str:
        return (
            f"stream = client.chat.completions.create(\n    model={self._model},\n"
            '    messages=[{"role": "user", "content": "Hello!"}],\n    stream=True,\n)\n'
            "for chunk in stream:\n"
            "    if chunk.choices:\n"
            '        print(chunk.choices[0].delta.content or "", end="", flush=True)\n'
            "print()\n"
        )

    def node_stream(self) -> str:
        return (
            f"const stream = await client.chat.completions.create({{\n  model: {self._model},\n"
            '  messages: [{ role: "user", content: "Hello!" }],\n  stream: true,\n});\n'
            "for await (const chunk of stream) {\n"
            '  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");\n'
            "}\n"
        )

    def python_chat(self) -> str:
        return (
            f"answer = client.chat.completions.create(\n    model={self._model},\n"
            '    messages=[{"role": "user", "content": "Hello!"}],\n)\n'
            "print(answer.choices[0].message.content)\n"
        )

    def node_chat(self) -> str:
        return (
            f"const answer = await client.chat.completions.create({{\n  model: {self._model},\n"
            '  messages: [{ role: "user", content: "Hello!" }],\n});\n'
            "console.log(answer.choices[0].message.content);\n"
        )

    def python_embedding(self) -> str:
        return f'answer = client.embeddings.create(model={self._model}, input="Hello!")\nprint(answer.data[0].embedding)\n'

    def node_embedding(self) -> str:
        return (
            f'const answer = await client.embeddings.create({{ model: {self._model}, input: "Hello!" }});\n'
            "console.log(answer.data[0].embedding);\n"
        )


def handout_of(base_url: str, key: str, model: str) -> str:
    """Return what the holder of a key needs: the address, the key, and three lines of Python that use both."""
    asked = json.dumps([{"role": "user", "content": "Hello!"}])
    return (
        f"Base URL: {base_url}\n"
        f"API key:  {key}\n\n"
        "from openai import OpenAI\n"
        f"client = OpenAI(base_url={json.dumps(base_url)}, api_key={json.dumps(key)})\n"
        f"print(client.chat.completions.create(model={json.dumps(model)}, messages={asked}).choices[0].message.content)\n"
    )
