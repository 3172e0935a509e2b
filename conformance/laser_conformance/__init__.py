"""Judges implementations of LASER attention: any registered backend, or files that a program of any language wrote.

``laser-conformance run --backend NAME`` on the command line, ``pytest --pyargs laser_conformance --laser-backend NAME``
in pytest. The documentation's page *Conformance* explains truth, tolerance, the levels and the layout of the files.
"""
