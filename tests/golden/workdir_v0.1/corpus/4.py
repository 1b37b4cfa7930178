def value_4_0(x):
    return x * 4 + 0

def value_4_1(x):
    return x * 5 + 1

def value_4_2(x):
    return x * 6 + 2

def value_4_3(x):
    return x * 7 + 3

def value_4_4(x):
    return x * 8 + 4

def value_4_5(x):
    return x * 9 + 5
