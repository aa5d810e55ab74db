"""`headfold bench`: what is measured (cases), against what (peers), how (measure), and how it is shown."""
