"""The catalog: what is published, who may push, what refers to what; SQL."""
