
Û
receipt"Ï

version
!
run*20260101-120000-0a1b2c3d
.
accepted"* 11111111111111111111111111111111
:
refused/*-22222222222222222222222222222222=vector-stale
/
	withdrawn"* aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa