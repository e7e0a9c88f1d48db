"""A pretrained language model in, pruned or fine-tuned, evaluated, and out again.

    python -m swe_prune plan     --model=PATH --criterion=wanda --sparsity=0.5
    python -m swe_prune prune    --model=PATH --criterion=wanda --sparsity=0.5 --out=DIR
    python -m swe_prune cut      --model=PATH --units=neurons --criterion=magnitude --sparsity=0.25
    python -m swe_prune finetune --model=PATH --track --out=DIR
    python -m swe_prune evaluate --model=PATH
    python -m swe_prune bench    --model=PATH --against=DENSE

settings   what each command may be told
texts      calibration and evaluation texts, by name or file, kept apart
choice     rules and blocks to the weights that may be pruned
request    settings to the recipe they ask for
judge      perplexity, distance from the dense model, and what it writes: a table
tracked    the trajectory that a tracked fine-tuning leaves for `prune --criterion=swe`
finetuning fine-tuning: tracked, with masks held, by adapters, under a teacher
bench      times of a model, in turns with another
cut        units cut out of a model
commands   the commands
"""
