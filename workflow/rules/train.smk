rule train:
    input:
        train_inputs,
    output:
        model=directory("results/train/{arm}/seed{seed}/model"),
        history="results/train/{arm}/seed{seed}/history.jsonl",
        cost="results/train/{arm}/seed{seed}/cost.json",
    log:
        "results/logs/train/{arm}/seed{seed}.log",
    benchmark:
        "results/benchmarks/train/{arm}/seed{seed}.tsv"
    container:
        cell_image()
    threads: PLAN.config.train.threads
    resources:
        mem_mb=16000,
        runtime=720,
    params:
        settings=settings_of("train", "arm"),
        code=code_of("train.trainer"),
        # not outputs: Snakemake deletes those of a job that failed, and a run goes on from its checkpoint
        cell=subpath(output.history, parent=True),
        checkpoints="results/checkpoints/{arm}/seed{seed}",
        launch=cell_launcher,
    # exec: a shell in between would end at SIGTERM, and SLURM kill what is left of the job before it has saved
    shell:
        "exec {params.launch} train --made --arm {wildcards.arm} --seed {wildcards.seed}"
        " --out {params.cell} --checkpoints {params.checkpoints} > {log} 2>&1"
