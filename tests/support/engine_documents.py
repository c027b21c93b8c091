"""What real engines answer about themselves, shortened: their documented fields, and some of the rest. By path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLLAMA: Mapping[str, Any] = {
    "/api/version": {"version": "0.12.5"},
    "/api/tags": {
        "models": [
            {
                "name": "qwen3:8b",
                "model": "qwen3:8b",
                "modified_at": "2026-11-01T10:00:00Z",
                "size": 5225388164,
                "digest": "500a1f067a9f",
                "details": {"format": "gguf", "family": "qwen3", "parameter_size": "8.2B", "quantization_level": "Q4_K_M"},
            },
            {
                "name": "nomic-embed-text:latest",
                "model": "nomic-embed-text:latest",
                "size": 274302450,
                "digest": "0a109f422b47",
                "details": {"family": "nomic-bert", "quantization_level": "F16"},
            },
        ]
    },
    "/api/ps": {
        "models": [
            {
                "name": "qwen3:8b",
                "model": "qwen3:8b",
                "size": 6000000000,
                "digest": "500a1f067a9f",
                "expires_at": "2026-11-28T22:00:00Z",
                "size_vram": 4800000000,
                "context_length": 8192,
            }
        ]
    },
    "/api/show": {
        "modelfile": "# Modelfile",
        "parameters": 'stop "<|im_end|>"\ntemperature 0.6',
        "template": "{{ .Prompt }}",
        "details": {"family": "qwen3"},
        "model_info": {"general.architecture": "qwen3", "qwen3.context_length": 131072},
        "capabilities": ["completion", "tools", "thinking"],
    },
}

LLAMA_CPP: Mapping[str, Any] = {
    "/props": {
        "default_generation_settings": {"id": 0, "n_ctx": 4096, "params": {"temperature": 0.8}},
        "total_slots": 4,
        "model_path": "/models/tiny.gguf",
        "chat_template": "{{ messages }}",
        "chat_template_caps": {"supports_tools": True, "supports_system_role": True},
        "modalities": {"vision": True, "audio": False},
        "build_info": "b6900-abcdef12",
        "is_sleeping": False,
    },
    "/v1/models": {
        "object": "list",
        "models": [{"name": "tiny", "capabilities": ["completion"]}],
        "data": [
            {
                "id": "tiny",
                "object": "model",
                "owned_by": "llamacpp",
                "meta": {"vocab_type": 1, "n_ctx_train": 131072, "n_embd": 64, "n_params": 1000, "size": 512000},
            }
        ],
    },
}

LLAMA_CPP_ROUTER: Mapping[str, Any] = {
    "/props": {"role": "router", "build_info": "b7500-abcdef12", "default_generation_settings": {"n_ctx": 0}},
    "/v1/models": {
        "object": "list",
        "data": [
            {"id": "org/one:Q4_K_M", "owned_by": "llamacpp", "status": {"value": "loaded", "args": ["llama-server"]}},
            {"id": "org/two:Q8_0", "owned_by": "llamacpp", "status": {"value": "unloaded"}},
            {"id": "org/three:Q8_0", "owned_by": "llamacpp", "status": {"value": "sleeping"}},
        ],
    },
}

VLLM: Mapping[str, Any] = {
    "/version": {"version": "0.11.0"},
    "/v1/models": {
        "object": "list",
        "data": [
            {"id": "meta/llama", "object": "model", "owned_by": "vllm", "root": "meta/llama", "parent": None, "max_model_len": 16384},
            {"id": "poet", "object": "model", "owned_by": "vllm", "root": "/adapters/poet", "parent": "meta/llama", "max_model_len": None},
        ],
    },
}

SGLANG: Mapping[str, Any] = {
    "/get_model_info": {
        "model_path": "Qwen/Qwen3-8B",
        "is_generation": True,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
    },
    "/server_info": {
        "model_path": "Qwen/Qwen3-8B",
        "served_model_name": "Qwen/Qwen3-8B",
        "context_length": None,
        "max_running_requests": 32,
        "quantization": "fp8",
        "tool_call_parser": "qwen25",
        "reasoning_parser": None,
        "internal_states": [{}],
        "version": "0.5.4",
    },
    "/v1/models": {"object": "list", "data": [{"id": "Qwen/Qwen3-8B", "owned_by": "sglang", "max_model_len": 40960}]},
}

LM_STUDIO: Mapping[str, Any] = {
    "/api/v1/models": {
        "models": [
            {
                "type": "llm",
                "key": "google/gemma-3-4b",
                "architecture": "gemma3",
                "quantization": {"name": "Q4_K_M", "bits_per_weight": 4},
                "size_bytes": 3341130752,
                "loaded_instances": [{"id": "google/gemma-3-4b", "config": {"context_length": 4096, "flash_attention": True}}],
                "max_context_length": 131072,
                "format": "gguf",
                "capabilities": {"vision": True, "trained_for_tool_use": False},
            },
            {
                "type": "llm",
                "key": "openai/gpt-oss-20b",
                "loaded_instances": [],
                "max_context_length": 131072,
                "capabilities": {"vision": False, "trained_for_tool_use": True, "reasoning": {"allowed_options": ["low", "high"]}},
            },
            {"type": "embedding", "key": "nomic-embed", "loaded_instances": [], "max_context_length": 2048},
        ]
    },
    "/v1/models": {"object": "list", "data": [{"id": "google/gemma-3-4b", "object": "model", "owned_by": "organization_owner"}]},
}

LM_STUDIO_BEFORE: Mapping[str, Any] = {
    "/api/v0/models": {
        "object": "list",
        "data": [
            {
                "id": "qwen2-vl-7b",
                "type": "vlm",
                "arch": "qwen2_vl",
                "quantization": "4bit",
                "state": "not-loaded",
                "max_context_length": 32768,
            },
            {
                "id": "qwen3-8b",
                "type": "llm",
                "quantization": "Q4_K_M",
                "state": "loaded",
                "max_context_length": 32768,
                "loaded_context_length": 4096,
                "capabilities": ["tool_use"],
            },
            {"id": "nomic-embed", "type": "embeddings", "state": "not-loaded", "max_context_length": 2048},
        ],
    },
    "/v1/models": {"object": "list", "data": [{"id": "qwen3-8b", "object": "model", "owned_by": "organization_owner"}]},
}

TGI: Mapping[str, Any] = {
    "/info": {
        "model_id": "org/model",
        "model_sha": "abc123",
        "model_pipeline_tag": "image-text-to-text",
        "max_concurrent_requests": 128,
        "max_input_tokens": 4095,
        "max_total_tokens": 4096,
        "router": "text-generation-router",
        "version": "3.0.0",
    },
    "/v1/models": {"object": "list", "data": [{"id": "org/model", "owned_by": "org/model"}]},
}

TEI: Mapping[str, Any] = {
    "/info": {
        "model_id": "BAAI/bge-reranker",
        "model_sha": "def456",
        "model_dtype": "float16",
        "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}}},
        "max_concurrent_requests": 512,
        "max_input_length": 512,
        "version": "1.8.0",
    }
}

LISTS_ONLY: Mapping[str, Any] = {
    "/v1/models": {"object": "list", "data": [{"id": "tiny", "owned_by": "mlx", "context_length": 32768}, {"id": "other"}]},
}
