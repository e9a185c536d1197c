"""One module per step of the DAG: read finished artefacts, call one function, write one artefact."""
