"""KIF in vLLM: a plugin that suppresses subjects in a real server, per request, beside LoRA.

Rooms by the process that they run in: `front` (the API server), `engine` (the engine core), `worker` (one per device).
Nothing here imports vllm when it is imported; `plugin.register` is where that begins.
"""
