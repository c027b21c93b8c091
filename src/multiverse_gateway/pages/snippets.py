"""Code that calls a model through the gateway, for the pages to show."""

import json
import shlex


def snippets_of(base_url: str, model: str, *, needs_key: bool) -> dict[str, str]:
    """Return code that sends a chat completion to a model, by language."""
    key = "your-client-key" if needs_key else "not-needed"
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    return {
        "Python": (
            "from openai import OpenAI\n\n"
            f"client = OpenAI(base_url={json.dumps(base_url)}, api_key={json.dumps(key)})\n"
            "answer = client.chat.completions.create(\n"
            f"    model={json.dumps(model)},\n"
            '    messages=[{"role": "user", "content": "Hello!"}],\n'
            ")\n"
            "print(answer.choices[0].message.content)\n"
        ),
        "Node": (
            'import OpenAI from "openai";\n\n'
            f"const client = new OpenAI({{ baseURL: {json.dumps(base_url)}, apiKey: {json.dumps(key)} }});\n"
            "const answer = await client.chat.completions.create({\n"
            f"  model: {json.dumps(model)},\n"
            '  messages: [{ role: "user", content: "Hello!" }],\n'
            "});\n"
            "console.log(answer.choices[0].message.content);\n"
        ),
        "curl": (
            f"curl {shlex.quote(base_url + '/chat/completions')} \\\n"
            + (f'  -H "Authorization: Bearer {key}" \\\n' if needs_key else "")
            + '  -H "Content-Type: application/json" \\\n'
            f"  -d {shlex.quote(json.dumps(body))}\n"
        ),
    }


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
