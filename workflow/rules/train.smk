rule train:
    input:
        needs("train"),
    output:
        **makes("train"),
    log:
        PATHS.log("train/{arm}/seed{seed}"),
    benchmark:
        PATHS.benchmark("train/{arm}/seed{seed}")
    container:
        cell_image()
    threads: PLAN.config.train.threads
    resources:
        mem_mb=memory("train", 16000),
        runtime=720,
    params:
        settings=settings("train"),
        code=code("train"),
        # not outputs: Snakemake deletes those of a job that failed, and a run goes on from its checkpoint
        cell=subpath(output.history, parent=True),
        checkpoints=str(PATHS.checkpoints("{arm}", "{seed}")),
        launch=cell_launcher,
    # exec: a shell in between would end at SIGTERM, and SLURM kill what is left of the job before it has saved
    shell:
        "exec {params.launch} train --made --arm {wildcards.arm} --seed {wildcards.seed}"
        " --out {params.cell} --checkpoints {params.checkpoints} > {log} 2>&1"
