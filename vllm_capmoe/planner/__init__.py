"""The planner: is a capacity limit worth it for a model, its prompts and so many ranks?

    vllm-capmoe plan --model MODEL --prompts FILE.jsonl --ep-size 8 --max-loss 1%

runs the prompts through vLLM in observe mode, where every limit of a grid is tried on every step
and none is applied, and says what each would drop, lose and gain.

    cli         the command line            counts      what an observed run counted
    prompts     the prompts' file           verdict     from counts to settings by layer
    grid        what is tried               report      tables for the terminal, JSON
    check       the same prompts, limited   page        one HTML page with its plots inside
    results     what the engines' processes leave

The engines' processes are `vllm_capmoe.integration.planner_engine`.
"""
