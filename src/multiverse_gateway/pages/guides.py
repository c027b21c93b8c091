"""How to start each engine so that a gateway on another computer can use it: the lines that the welcome page shows to copy."""

import attrs


@attrs.frozen(kw_only=True)
class EngineGuide:
    """How to start one engine: `steps` are pairs of a sentence and the command that it introduces, `caution` is what often goes wrong.

    `tunnel` is the command for a computer that the gateway cannot reach directly.
    """

    name: str
    port: int
    model: str
    steps: tuple[tuple[str, str], ...]
    caution: str
    tunnel: str


GUIDES = (
    EngineGuide(
        name="Ollama",
        port=11434,
        model="llama3.2:3b",
        steps=(
            ("Start Ollama so that other computers can reach it:", "OLLAMA_HOST=0.0.0.0 ollama serve"),
            ("In a second terminal, load a model:", "ollama pull llama3.2:3b"),
        ),
        caution=(
            "If the first command says “address already in use”, Ollama is running already, for its own computer only. "
            "Quit it, then try again (on Linux: sudo systemctl stop ollama)."
        ),
        tunnel="cloudflared tunnel --url http://localhost:11434 --http-host-header localhost:11434",
    ),
    EngineGuide(
        name="LM Studio",
        port=1234,
        model="llama-3.2-1b-instruct",
        steps=(
            ("Load a model:", "lms get llama-3.2-1b-instruct"),
            ("Start the server:", "lms server start --port 1234"),
        ),
        caution="Then turn on “Serve on Local Network” in the settings of its server; otherwise only its own computer can reach it.",
        tunnel="cloudflared tunnel --url http://localhost:1234",
    ),
    EngineGuide(
        name="llama.cpp",
        port=8080,
        model="gemma-3-1b",
        steps=(
            (
                "Start the server; the first start downloads the model:",
                "llama-server -hf ggml-org/gemma-3-1b-it-GGUF --alias gemma-3-1b --host 0.0.0.0 --port 8080",
            ),
        ),
        caution="Without --host 0.0.0.0 only its own computer can reach it.",
        tunnel="cloudflared tunnel --url http://localhost:8080",
    ),
)
"""The guides in the order of the tabs."""
