#pragma once  // all of it is in shim.h
