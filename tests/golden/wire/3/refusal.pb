
R
refusal"G

version

code*privacy-budget

correlation-id
*0a1b2c3d