"""Pictures of a trace. The numbers come from `moempi.analysis`; matplotlib is loaded when a picture is drawn.

Every picture can be read without colour: shades rise with the value, and kinds differ in hatching too.
"""
