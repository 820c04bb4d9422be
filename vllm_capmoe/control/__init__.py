"""A running server from a terminal: `vllm-capmoe watch` and `vllm-capmoe set`.

Standard library only: it runs where neither vLLM nor torch is installed.

    client.py     the route of the server, see vllm_capmoe/integration/endpoint.py
    picture.py    loads of layers and experts, for a terminal and as a page
    cli.py        the two commands
"""
