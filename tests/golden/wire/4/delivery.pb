
€
delivery"t

version
!
run*20260101-120000-0a1b2c3d

hospital	*st-mary
)
key"2 ı›S‘u\¥ÔÄá3…B…‘ŸXTÿÈ—{2eXÛ¸éŒ
 
parcel•
0
withdrawal-0 
uint8consilium.bytes"one
0
withdrawal-1 
uint8consilium.bytes"two
/
vector%
uint8consilium.bytes"a vector