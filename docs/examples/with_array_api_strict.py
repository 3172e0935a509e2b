"""array-api-strict: any library that speaks the array API standard works, without being named anywhere."""

import array_api_strict as xp

import laser_core

query, key, value = (xp.reshape(xp.linspace(-1, 1, 2 * 4 * 16 * 8) ** n, (2, 4, 16, 8)) for n in (1, 2, 3))

out, lse = laser_core.laser_attention(query, key, value, window_size=(4, 0), return_lse=True)

print(type(out).__module__.partition(".")[0], out.dtype, out.shape, lse.shape)
assert (out.dtype, out.shape, lse.shape) == (query.dtype, value.shape, query.shape[:-1])
assert xp.all(xp.isfinite(out))
